"""Z-order: the order of the positions of a block in packed features."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_SIZES = (1, 2, 4, 8, 16, 32)


def block_side(positions: int) -> int:
    """The side `s` of a block of `s * s` positions.

    Raises:
        ValueError: `positions` is not the square of one of `BLOCK_SIZES`.
    """
    for side in BLOCK_SIZES:
        if side * side == positions:
            return side
    raise ValueError(
        f"packed features are [T, s*s, C] with s one of {BLOCK_SIZES}, got s*s = {positions}"
    )


def to_zorder(x: Tensor) -> Tensor:
    """`[..., s, s] -> [..., s*s]`: rows and columns of a block to its Z-order (`s` a power of two).

    The bits of row and column alternate, the row's first, so that every 2 x 2, 4 x 4, ... square is
    contiguous: `[[0, 1], [2, 3]]` is the order within each 2 x 2 square, and of the squares.
    A strided convolution with kernel = stride is then a reshape and a matrix product.
    """
    lead, side = x.shape[:-2], x.shape[-1]
    bits = int(side).bit_length() - 1
    x = x.reshape(*lead, *(2,) * (2 * bits))
    first = len(lead)
    order = [first + axis * bits + bit for bit in range(bits) for axis in (0, 1)]
    return x.permute(*range(first), *order).reshape(*lead, side * side)


def from_zorder(x: Tensor) -> Tensor:
    """`[..., s*s] -> [..., s, s]`: the inverse of `to_zorder`."""
    lead, side = x.shape[:-1], math.isqrt(x.shape[-1])
    bits = int(side).bit_length() - 1
    x = x.reshape(*lead, *(2,) * (2 * bits))
    first = len(lead)
    order = [first + 2 * bit + axis for axis in (0, 1) for bit in range(bits)]
    return x.permute(*range(first), *order).reshape(*lead, side, side)


def rows_to_zorder(x: Tensor) -> Tensor:
    """`[T, s, s, ...] -> [T, s*s, ...]`: `to_zorder` of axes 1 and 2, in one copy."""
    bits = int(x.shape[1]).bit_length() - 1
    split = x.reshape(x.shape[0], *(2,) * (2 * bits), *x.shape[3:])
    order = [1 + axis * bits + bit for bit in range(bits) for axis in (0, 1)]
    rest = range(1 + 2 * bits, split.dim())
    return split.permute(0, *order, *rest).reshape(x.shape[0], x.shape[1] ** 2, *x.shape[3:])


def rows_from_zorder(x: Tensor) -> Tensor:
    """`[T, s*s, ...] -> [T, s, s, ...]`: the inverse of `rows_to_zorder`."""
    side = math.isqrt(x.shape[1])
    bits = side.bit_length() - 1
    split = x.reshape(x.shape[0], *(2,) * (2 * bits), *x.shape[2:])
    order = [1 + 2 * bit + axis for axis in (0, 1) for bit in range(bits)]
    rest = range(1 + 2 * bits, split.dim())
    return split.permute(0, *order, *rest).reshape(x.shape[0], side, side, *x.shape[2:])


def patch_matrix(weight: Tensor) -> Tensor:
    """`to_zorder(weight).transpose(1, 2).flatten(1)`: `[O, I, k, k] -> [O, k*k * I]`, in one copy.

    The matrix of a convolution whose stride is its kernel. It is written out because its gradient
    then copies whole rows of channels too: several times faster.
    """
    side = int(weight.shape[2])
    if side == 1:
        return weight.flatten(1)
    bits = side.bit_length() - 1
    halves = (2,) * bits
    bit_by_bit = weight.permute(0, 2, 3, 1).unflatten(2, halves).unflatten(1, halves)
    order = [1 + axis * bits + bit for bit in range(bits) for axis in (0, 1)]
    return bit_by_bit.permute(0, *order, -1).flatten(1)
