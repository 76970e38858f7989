"""Products of matrices with `Packed`, as linear and global-context attention make them.

Three kinds stay within an image and are exact: a sum over its visible positions, a matrix of an
image times the channels of its positions, and a matrix of weights. A matrix of positions times
positions is none of them.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from convmae_kernels.functional import pooling
from convmae_kernels.packed.map_like import ATTENTION, handles
from convmae_kernels.packed.packed import HANDLERS, Packed

_handles = partial(handles, HANDLERS)


@_handles(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
def _matmul(func, input, other):
    if isinstance(input, Packed) and isinstance(other, Packed):
        return _sum_of_positions(input, other)
    if isinstance(other, Packed):
        if other.axes[-2:] == "CN" and 2 <= input.dim() <= other.ndim:
            return _times_matrices(other, input.transpose(-2, -1))
    elif input.axes[-1] == "C" and other.dim() == 2:
        return input.like(input.features @ other)
    elif input.axes[-2:] == "NC" and 2 < other.dim() <= input.ndim:
        return _times_matrices(input, other)
    raise NotImplementedError(ATTENTION)


def _sum_of_positions(a: Packed, b: Packed) -> Tensor:
    """`[B, ..., i, N] @ [B, ..., N, j]`: plain `[B, ..., i, j]`."""
    lead = a.axes[:-2]
    if (a.axes[-2:], b.axes[-2:]) != ("CN", "NC") or lead != b.axes[:-2] or lead[:1] != "B":
        raise NotImplementedError(ATTENTION)
    blocks = a.features.movedim(1, -1) @ b.features.movedim(1, -2)  # [T, ..., i, j]
    sums = pooling.image_sum(blocks.flatten(1).unsqueeze(1), a.mask)
    return sums.to(blocks.dtype).unflatten(1, blocks.shape[1:])


def _times_matrices(x: Packed, matrices: Tensor) -> Packed:
    """`[B, ..., N, i] @ [B, ..., i, j]`, or the same of `[B, ..., i, N]`: like `x`."""
    images = matrices.reshape(*(1,) * (x.ndim - matrices.dim()), *matrices.shape)
    if x.axes[:1] != "B" or images.shape[0] not in (1, x.mask.batch_size):
        raise ValueError(f"{list(matrices.shape)} does not multiply {tuple(x.shape)}")
    blocks = images if len(images) == 1 else pooling.spread_to_blocks(images, x.mask)
    return x.like((x.features.movedim(1, -2) @ blocks).movedim(-2, 1))
