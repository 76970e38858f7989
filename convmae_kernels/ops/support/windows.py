"""From the windows of blocks to what each output of a convolution looks at, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from convmae_kernels.zorder import rows_from_zorder, rows_to_zorder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def patches_of_windows(
    windows: Tensor, kernel: Sequence[int], stride: int, dilation: Sequence[int]
) -> Tensor:
    """`[T, rows, columns, C] -> [T, n*n, kh * kw * C]`: what each of `n*n` outputs looks at."""
    for axis, (k, d) in enumerate(zip(kernel, dilation), start=1):
        windows = windows.unfold(axis, d * (k - 1) + 1, stride)[..., ::d]
    return rows_to_zorder(windows.permute(0, 1, 2, 4, 5, 3)).flatten(2)


def add_patches(
    patches: Tensor,
    kernel: Sequence[int],
    stride: int,
    dilation: Sequence[int],
    rows: int,
    columns: int,
) -> Tensor:
    """The gradient of `patches_of_windows` in the windows."""
    tiles = rows_from_zorder(patches)
    blocks, side = tiles.shape[:2]
    channels = patches.shape[2] // (kernel[0] * kernel[1])
    tiles = tiles.view(blocks, side, side, *kernel, channels)
    windows = patches.new_zeros(blocks, rows, columns, channels)
    last = stride * (side - 1) + 1
    for i in range(kernel[0]):
        top = i * dilation[0]
        for j in range(kernel[1]):
            left = j * dilation[1]
            met = windows[:, top : top + last : stride, left : left + last : stride]
            met += tiles[:, :, :, i, j]
    return windows
