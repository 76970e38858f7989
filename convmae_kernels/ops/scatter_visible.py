"""Packed features of the visible blocks back to dense feature maps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from convmae_kernels.ops import reference
from convmae_kernels.ops.support.checks import check_packed
from convmae_kernels.ops.support.choices import Sizes
from convmae_kernels.ops.support.dispatch import Impl, as_measured, register, select

if TYPE_CHECKING:
    from torch import Tensor

    from convmae_kernels.block_mask import BlockMask


def _fake(x, block_index, batch, gh, gw, fill):
    side = math.isqrt(x.shape[1])
    return x.new_empty(batch, gh * side, gw * side, x.shape[2]).permute(0, 3, 1, 2)


def _derivatives(ops):
    def setup_context(ctx, inputs, output):
        _, block_index, _, ctx.gh, ctx.gw, _ = inputs
        ctx.save_for_backward(block_index)

    def backward(ctx, grad):
        (block_index,) = ctx.saved_tensors
        grad_x = ops.gather_visible(grad, block_index, ctx.gh, ctx.gw)
        return grad_x, None, None, None, None, None

    return backward, setup_context


register(
    "scatter_visible(Tensor x, Tensor block_index, SymInt batch, SymInt gh, SymInt gw, float fill)"
    " -> Tensor",
    reference.scatter_visible,
    _fake,
    _derivatives,
)


def scatter_visible(
    x: Tensor, mask: BlockMask, fill: float = 0.0, *, impl: Impl = "auto"
) -> Tensor:
    """The inverse of `gather_visible`: `[T, s*s, C] -> [B, C, gh*s, gw*s]`.

    Args:
        x: packed features `[T, s*s, C]`, float32, bfloat16, float16 or float64.
        mask: the mask that they were packed with.
        fill: the value of hidden positions.
        impl: which implementation runs; "auto" is the fastest that is there.

    Returns:
        `[B, C, gh*s, gw*s]` in channels-last memory format, in the dtype of `x`. Differentiable.

    Raises:
        TypeError: `x` is not a tensor of one of the dtypes, or `mask` is not a `BlockMask`.
        ValueError: rank, device or number of blocks do not fit the mask.
        RuntimeError: `impl` was named and cannot run.
    """
    sizes = Sizes(check_packed("x", x, mask), x.shape[2])
    impl = as_measured(impl, "scatter_visible", x, sizes)
    run = select(impl, "scatter_visible", reference.scatter_visible, x, mask)
    return run(x, mask.block_index, mask.batch_size, *mask.grid, float(fill))
