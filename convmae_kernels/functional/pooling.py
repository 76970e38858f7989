"""Pooling of packed features, over visible positions only.

Where there is no visible position at all, a sum, a mean and a maximum are 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from convmae_kernels.functional.borders import NOTHING, Border, beyond, border_windows
from convmae_kernels.ops.support import geometry
from convmae_kernels.ops.support.checks import check_packed
from convmae_kernels.ops.support.dtypes import accumulation_dtype
from convmae_kernels.ops.support.geometry import check_padding, check_stride, pair
from convmae_kernels.zorder import block_side, rows_to_zorder

if TYPE_CHECKING:
    from convmae_kernels.block_mask import BlockMask


def masked_max_pool2d(
    x: Tensor,
    mask: BlockMask,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    ceil_mode: bool = False,
    *,
    border: Border = NOTHING,
) -> Tensor:
    """The maximum of the visible positions of each window, at visible positions.

    0 where a window has none, as a dilated one may: it need not see its own position.

    Args:
        x: packed features `[T, s*s, C]`, float32, bfloat16, float16 or float64.
        mask: the mask that `x` was packed with.
        kernel_size, dilation, ceil_mode: as in `torch.nn.functional.max_pool2d`.
        stride: a power of two up to `s`; `kernel_size` if None.
        padding: with which a map's side shrinks by `stride` exactly.
        border: what lies around the image, and takes part like visible positions; a value of
            -infinity takes no part.

    Returns:
        `[T, (s / stride) ** 2, C]` in the dtype of `x`, for the same mask.

    Raises:
        TypeError: `x` is not a tensor of one of the dtypes, or `mask` is not a `BlockMask`.
        ValueError: shapes, devices, stride or padding do not fit.
    """
    pool = _Pool.plan(x, mask, kernel_size, stride, padding, dilation, ceil_mode, border)
    lowest = float("-inf")
    windows = border_windows(x, mask, pool.halo, border, lowest, lowest)
    y = F.max_pool2d(windows.permute(0, 3, 1, 2), pool.kernel, pool.stride, 0, pool.dilation)
    if not pool.sees_its_own:
        ones = x.new_ones(x.shape[0], x.shape[1], 1)
        shown = border._replace(value=float(border.value != lowest))
        seen = border_windows(ones, mask, pool.halo, shown).permute(0, 3, 1, 2)
        y = torch.where(F.max_pool2d(seen, pool.kernel, pool.stride, 0, pool.dilation) > 0, y, 0)
    return rows_to_zorder(y.permute(0, 2, 3, 1))


def masked_avg_pool2d(
    x: Tensor,
    mask: BlockMask,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = False,
    divisor_override: int | None = None,
    *,
    border: Border = NOTHING,
) -> Tensor:
    """The mean of the visible positions of each window, at visible positions.

    Arguments, result and errors are those of `masked_max_pool2d`, and further:

    Args:
        count_include_pad: whether the padding counts, as zeros, like visible positions; of a mask
            that shows everything the result is then that of
            `torch.nn.functional.avg_pool2d(..., count_include_pad=True)`. A border always counts.
        divisor_override: by what the sum of the visible positions is divided, in place of their
            number.
    """
    pool = _Pool.plan(x, mask, kernel_size, stride, padding, 1, ceil_mode, border)
    kernel, step = pool.kernel, pool.stride
    windows = border_windows(x, mask, pool.halo, border).permute(0, 3, 1, 2)
    if divisor_override is not None:
        y = F.avg_pool2d(windows, kernel, step, divisor_override=divisor_override)
        return rows_to_zorder(y.permute(0, 2, 3, 1))
    ones = x.new_ones(x.shape[0], x.shape[1], 1)
    seen = border_windows(ones, mask, pool.halo, border._replace(value=1.0))
    if count_include_pad and max(pool.padding) > 0:
        side = block_side(x.shape[1])
        padded = beyond(mask, side, pool.halo, border)
        padded = padded & ~beyond(mask, side, pool.halo, border.wider(*pool.padding))
        seen = torch.where(padded, 1, seen)
    count = F.avg_pool2d(seen.permute(0, 3, 1, 2), kernel, step)
    count = count if pool.sees_its_own else torch.where(count > 0, count, 1)
    return rows_to_zorder((F.avg_pool2d(windows, kernel, step) / count).permute(0, 2, 3, 1))


class _Pool(NamedTuple):
    """Where the windows of a pooling lie.

    Attributes:
        kernel, padding, dilation: of rows and columns.
        stride: of both.
        halo: of the blocks' windows.
        sees_its_own: whether every window holds a position of its own block.
    """

    kernel: tuple[int, int]
    stride: int
    padding: tuple[int, int]
    dilation: tuple[int, int]
    halo: tuple[int, int, int, int]
    sees_its_own: bool

    @classmethod
    def plan(cls, x, mask, kernel_size, stride, padding, dilation, ceil_mode, border) -> _Pool:
        """Raises a ValueError where the map's side does not shrink by `stride` exactly."""
        side = check_packed("x", x, mask)
        kernel, steps = pair("kernel_size", kernel_size), pair("dilation", dilation)
        step = check_stride(kernel if stride is None else stride, side)
        rows, columns = pair("padding", padding, least=0)
        sides = (
            (border.top + rows, border.bottom + rows),
            (border.left + columns, border.right + columns),
        )
        before = sides[0][0], sides[1][0]
        if ceil_mode:
            sizes = [n * side + sum(s) for n, s in zip(mask.grid, sides)]
            outputs = [n * side // step for n in mask.grid]
            for size, output, k, d, p in zip(sizes, outputs, kernel, steps, (rows, columns)):
                last = -(-(size - d * (k - 1) - 1) // step)
                if last * step >= size - p:  # it would begin behind the image
                    last -= 1
                if last + 1 != output:
                    raise ValueError(
                        f"ceil_mode=True would make a {'larger' if last >= output else 'smaller'} "
                        f"map: {last + 1} positions, where the grid of blocks has {output}"
                    )
        else:
            symmetric = border[:4] == NOTHING[:4]
            check_padding(padding if symmetric else sides, kernel, step, steps)
        halo = geometry.window_halo(kernel, step, before, steps)
        if min(halo) <= -side:
            raise ValueError(f"padding {sides} leaves no window of blocks of side {side}")
        own = max(steps) == 1 and all(-step < p < k for p, k in zip(before, kernel))
        return cls(kernel, step, (rows, columns), steps, halo, own)


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
