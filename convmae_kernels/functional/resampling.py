"""Resampling of packed features with the weights of visible positions only."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from convmae_kernels.functional.borders import block_places
from convmae_kernels.ops.gather_windows import gather_windows
from convmae_kernels.ops.support.checks import check_packed
from convmae_kernels.ops.support.dtypes import accumulation_dtype
from convmae_kernels.zorder import BLOCK_SIZES, rows_to_zorder

if TYPE_CHECKING:
    from convmae_kernels.block_mask import BlockMask

REACH = {"nearest": 0, "nearest-exact": 0, "area": 0, "bilinear": 1, "bicubic": 2}


def masked_interpolate(
    x: Tensor,
    mask: BlockMask,
    scale_factor: float,
    mode: str = "nearest",
    align_corners: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    """`sum(w[q] * x[q]) / sum(w[q])` over the visible positions `q` that `mode` weights with `w`.

    Hidden neighbours do not count, and the weights of the visible ones are scaled so that their sum
    is 1. Of a mask that shows everything it is `torch.nn.functional.interpolate`.

    Args:
        x: packed features `[T, s*s, C]`, float32, bfloat16, float16 or float64.
        mask: the mask that `x` was packed with.
        scale_factor: a power of two, which may be below 1, of both directions.
        mode: "nearest", "nearest-exact", "area", "bilinear" or "bicubic".
        align_corners, antialias: as in `torch.nn.functional.interpolate`. `align_corners` is
            refused for "bicubic", some of whose weights are negative: those of the visible
            positions could add up to nothing.

    Returns:
        `[T, (s * scale_factor) ** 2, C]` in the dtype of `x`, for the same mask. Differentiable any
        number of times.

    Raises:
        TypeError: `x` is not a tensor of one of the dtypes, or `mask` is not a `BlockMask`.
        ValueError: shapes, devices or options do not fit.
    """
    side = check_packed("x", x, mask)
    if mode not in REACH:
        raise ValueError(f"mode must be one of {', '.join(REACH)}, got {mode!r}")
    if mode == "bicubic" and align_corners:
        raise ValueError(
            "align_corners=True is not supported with mode='bicubic': it moves positions between "
            "blocks, where weights of visible positions, some negative, may add up to nothing"
        )
    if antialias and align_corners:
        raise ValueError("antialias=True is not supported with align_corners=True")
    new_side = int(side * scale_factor)
    if new_side != side * scale_factor or new_side not in BLOCK_SIZES:
        raise ValueError(
            f"scale_factor must be a power of two with which blocks of side {side} have a side of "
            f"1 to {BLOCK_SIZES[-1]}, got {scale_factor}"
        )
    if mode in ("nearest", "nearest-exact") and new_side >= side:
        return x.repeat_interleave((new_side // side) ** 2, dim=1)
    reach = REACH[mode]
    if antialias and new_side < side:
        reach *= side // new_side
    wide = accumulation_dtype(x.dtype)
    windows = gather_windows(x, mask, (reach,) * 4).to(wide)
    ones = gather_windows(x.new_ones(x.shape[0], x.shape[1], 1), mask, (reach,) * 4).to(wide)
    rows, columns = (
        _of_blocks(
            _matrix(number * side, number * new_side, mode, align_corners, antialias, ones),
            number,
            reach,
        ).index_select(0, place)
        for number, place in zip(mask.grid, block_places(mask))
    )
    y = _weighted(rows, columns, windows) / _weighted(rows, columns, ones)
    return rows_to_zorder(y).to(x.dtype)


def _matrix(
    size: int, new_size: int, mode: str, align_corners: bool | None, antialias: bool, like: Tensor
) -> Tensor:
    """`[new_size, size]`: how PyTorch weights the positions of a line."""
    unit = torch.eye(size, dtype=like.dtype, device=like.device)[None, None]
    new = F.interpolate(
        unit, size=(new_size, size), mode=mode, align_corners=align_corners, antialias=antialias
    )
    return new[0, 0]


def _of_blocks(matrix: Tensor, number: int, reach: int) -> Tensor:
    """`[number * n, number * s] -> [number, n, reach + s + reach]`: what a block's window needs."""
    side = matrix.shape[1] // number
    padded = F.pad(matrix, (reach, reach)).unflatten(0, (number, -1))
    begin = torch.arange(number, device=matrix.device) * side
    columns = begin[:, None] + torch.arange(side + 2 * reach, device=matrix.device)
    return padded.gather(2, columns.unsqueeze(1).expand(-1, padded.shape[1], -1))


def _weighted(rows: Tensor, columns: Tensor, windows: Tensor) -> Tensor:
    """`[T, n, k]`, `[T, n, k]`, `[T, k, k, C] -> [T, n, n, C]`: sums over both axes."""
    lines = (rows @ windows.flatten(2)).unflatten(2, windows.shape[2:])  # [T, n, k, C]
    return columns.unsqueeze(1) @ lines


def power_of_two(factor: float) -> bool:
    """Whether a number is a power of two, such as 4 or 0.25."""
    return factor > 0 and math.frexp(factor)[0] == 0.5
