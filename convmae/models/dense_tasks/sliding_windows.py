"""Predictions of large pictures, window by window."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def window_starts(size: int, window: int, stride: int) -> list[int]:
    """Where windows begin along one side: every `stride` pixels, the last one at the border.

    The numbers are those of mmseg: `max(size - window + stride - 1, 0) // stride + 1` windows.

    Args:
        size: pixels of the side, at least `window`.
        window: pixels of a window.
        stride: pixels from one window to the next.
    """
    count = max(size - window + stride - 1, 0) // stride + 1
    return [min(i * stride, size - window) for i in range(count)]


def by_windows(
    logits_of: Callable[[Tensor], Tensor],
    images: Tensor,
    window: tuple[int, int],
    stride: tuple[int, int],
) -> Tensor:
    """The mean of the logits of all windows that hold a pixel.

    Pictures smaller than a window are padded with 0, which is the mean of normalised pictures, on
    the right and at the bottom; the padding is cut off again.

    Args:
        logits_of: from pictures `[N, C, *window]` to logits `[N, K, *window]`.
        images: `[N, C, H, W]`.
        window: height and width of the windows.
        stride: pixels from one window to the next, down and to the right; at most `window`.

    Returns:
        Logits float32 `[N, K, H, W]`.
    """
    height, width = images.shape[2:]
    padding = (0, max(window[1] - width, 0), 0, max(window[0] - height, 0))
    x = F.pad(images, padding)
    tops = window_starts(x.shape[2], window[0], stride[0])
    lefts = window_starts(x.shape[3], window[1], stride[1])
    total: Tensor | None = None
    count = x.new_zeros(x.shape[2:], dtype=torch.float32)
    for top in tops:
        for left in lefts:
            rows, columns = slice(top, top + window[0]), slice(left, left + window[1])
            found = logits_of(x[:, :, rows, columns]).float()
            if total is None:
                total = found.new_zeros(*found.shape[:2], *x.shape[2:])
            total[:, :, rows, columns] += found
            count[rows, columns] += 1
    assert total is not None  # there is a window at least
    return (total / count)[:, :, :height, :width]
