"""Pooling of packed features, over visible positions only.

Where there is no visible position at all, a sum, a mean and a maximum are 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from convmae_kernels.ops.gather_windows import gather_windows
from convmae_kernels.ops.support import geometry
from convmae_kernels.ops.support.checks import check_packed
from convmae_kernels.ops.support.dtypes import accumulation_dtype
from convmae_kernels.ops.support.geometry import check_padding, check_stride, pair
from convmae_kernels.zorder import rows_to_zorder

if TYPE_CHECKING:
    from convmae_kernels.block_mask import BlockMask


def masked_max_pool2d(
    x: Tensor,
    mask: BlockMask,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
) -> Tensor:
    """The maximum of the visible positions of each window, at visible positions.

    0 where a window has none, as a dilated one may: it need not see its own position.

    Args:
        x: packed features `[T, s*s, C]`, float32, bfloat16, float16 or float64.
        mask: the mask that `x` was packed with.
        kernel_size, dilation: as in `torch.nn.functional.max_pool2d`.
        stride: a power of two up to `s`; `kernel_size` if None.
        padding: with which a map's side shrinks by `stride` exactly.

    Returns:
        `[T, (s / stride) ** 2, C]` in the dtype of `x`, for the same mask.

    Raises:
        TypeError: `x` is not a tensor of one of the dtypes, or `mask` is not a `BlockMask`.
        ValueError: shapes, devices, stride or padding do not fit.
    """
    windows, kernel, step, dilation = _windows(
        x, mask, kernel_size, stride, padding, dilation, float("-inf")
    )
    y = F.max_pool2d(windows, kernel, step, 0, dilation)
    if max(pair("dilation", dilation)) > 1:
        ones = x.new_ones(x.shape[0], x.shape[1], 1)
        seen = _windows(ones, mask, kernel_size, stride, padding, dilation, 0.0)[0]
        y = torch.where(F.max_pool2d(seen, kernel, step, 0, dilation) > 0, y, 0)
    return rows_to_zorder(y.permute(0, 2, 3, 1))


def masked_avg_pool2d(
    x: Tensor,
    mask: BlockMask,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
) -> Tensor:
    """The mean of the visible positions of each window, at visible positions.

    Arguments, result and errors are those of `masked_max_pool2d`.
    """
    windows, kernel, step, _ = _windows(x, mask, kernel_size, stride, padding, 1, 0.0)
    ones = x.new_ones(x.shape[0], x.shape[1], 1)
    seen = _windows(ones, mask, kernel_size, stride, padding, 1, 0.0)[0]
    y = F.avg_pool2d(windows, kernel, step) / F.avg_pool2d(seen, kernel, step)
    return rows_to_zorder(y.permute(0, 2, 3, 1))


def _windows(x, mask, kernel_size, stride, padding, dilation, fill):
    """The windows `[T, C, rows, columns]`, and kernel, stride and dilation as numbers."""
    side = check_packed("x", x, mask)
    kernel, dilation = pair("kernel_size", kernel_size), pair("dilation", dilation)
    step = check_stride(kernel if stride is None else stride, side)
    padding = check_padding(padding, kernel, step, dilation)
    halo = geometry.window_halo(kernel, step, padding, dilation)
    return gather_windows(x, mask, halo, fill).permute(0, 3, 1, 2), kernel, step, dilation


# -- all positions of an image --------------------------------------------------------------------


def spread_to_blocks(values: Tensor, mask: BlockMask) -> Tensor:
    """`[B, ...] -> [T, ...]`: to every visible block the values of its image.

    Raises:
        ValueError: `values` is for another number of images.
    """
    if values.shape[0] != mask.batch_size:
        raise ValueError(f"values is for {values.shape[0]} images, the mask for {mask.batch_size}")
    if mask.visible_per_image is None:
        return values.index_select(0, mask.image_index)
    repeated = values.unsqueeze(1).expand(-1, mask.visible_per_image, *values.shape[1:])
    return repeated.flatten(0, 1)


def image_counts(mask: BlockMask, side: int) -> Tensor:
    """The number of visible positions of every image, for blocks of this side: int64 `[B]`."""
    return mask.visible.flatten(1).sum(1) * side * side


def image_sum(x: Tensor, mask: BlockMask) -> Tensor:
    """The sum over an image's visible positions: `[T, s*s, C] -> [B, C]`, float32 for half types.

    Raises:
        TypeError, ValueError: `x` is not packed with this mask.
    """
    check_packed("x", x, mask)
    wide = accumulation_dtype(x.dtype)
    if mask.visible_per_image is not None:
        positions = mask.visible_per_image * x.shape[1]
        return x.reshape(mask.batch_size, positions, x.shape[2]).sum(1, dtype=wide)
    blocks = x.sum(1, dtype=wide)
    zeros = blocks.new_zeros(mask.batch_size, x.shape[2])
    return zeros.index_add(0, mask.image_index, blocks)


def image_mean(x: Tensor, mask: BlockMask) -> Tensor:
    """The mean over an image's visible positions, 0 if it has none: `[T, s*s, C] -> [B, C]`.

    In the dtype of `x`. Raises what `image_sum` raises.
    """
    side = check_packed("x", x, mask)
    counts = image_counts(mask, side).clamp_min(1).unsqueeze(1)
    return (image_sum(x, mask) / counts).to(x.dtype)


def image_max(x: Tensor, mask: BlockMask) -> Tensor:
    """The maximum over an image's visible positions, 0 if it has none: `[T, s*s, C] -> [B, C]`.

    Raises:
        TypeError, ValueError: `x` is not packed with this mask.
    """
    check_packed("x", x, mask)
    blocks = x.amax(1)
    lowest = blocks.new_full((mask.batch_size, x.shape[2]), float("-inf"))
    index = mask.image_index.unsqueeze(1).expand_as(blocks)
    highest = lowest.scatter_reduce(0, index, blocks, "amax")
    return torch.where(image_counts(mask, 1).unsqueeze(1) > 0, highest, 0)
