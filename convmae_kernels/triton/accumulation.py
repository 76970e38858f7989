"""What sums are accumulated in, and in which order they are added up."""

import torch
import triton
import triton.language as tl


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """float64 for float64, float32 for all others."""
    return tl.float64 if dtype == torch.float64 else tl.float32


@triton.jit
def pairwise_sum(x, OUTER: tl.constexpr, LANES: tl.constexpr, INNER: tl.constexpr):
    """`[OUTER, LANES, INNER] -> [OUTER, INNER]`: sums of two neighbours, then of two of these, ...

    `tl.sum` of more than two terms adds them in an order that the number of warps decides.
    """
    if LANES == 1:
        return tl.reshape(x, (OUTER, INNER))
    else:
        pairs = tl.sum(tl.reshape(x, (OUTER, LANES // 2, 2, INNER)), axis=2)
        return pairwise_sum(pairs, OUTER, LANES // 2, INNER)
