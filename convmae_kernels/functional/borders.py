"""Windows of blocks with an explicit border around the image: what `F.pad` puts there."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from convmae_kernels.ops.gather_windows import gather_windows
from convmae_kernels.zorder import block_side

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convmae_kernels.block_mask import BlockMask


class Border(NamedTuple):
    """Positions around an image, as `torch.nn.functional.pad` adds them.

    Attributes:
        top, bottom, left, right: how many; negative where the image loses some instead.
        mode: "constant", "reflect" or "replicate"; the two last show what lies inside the image,
            hidden positions as hidden.
        value: of the mode "constant".
    """

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0
    mode: str = "constant"
    value: float = 0.0

    def wider(self, rows: int, columns: int) -> Border:
        """With more positions on both sides."""
        return self._replace(
            top=self.top + rows,
            bottom=self.bottom + rows,
            left=self.left + columns,
            right=self.right + columns,
        )


NOTHING = Border()


def border_windows(
    x: Tensor,
    mask: BlockMask,
    halo: tuple[int, int, int, int],
    border: Border,
    hidden: float = 0.0,
    outside: float = 0.0,
) -> Tensor:
    """`gather_windows` of an image with a border: `[T, s*s, C] -> [T, rows, columns, C]`.

    Args:
        x: packed features `[T, s*s, C]`.
        mask: the mask that `x` was packed with.
        halo: positions above, below, left and right of a block that its window has too.
        border: what lies around the image.
        hidden: the value of hidden positions.
        outside: the value of what lies beyond the border.

    Returns:
        The windows in raster order, in the dtype of `x`. Differentiable any number of times.
    """
    side = block_side(x.shape[1])
    sides = border[:4]
    if border.mode != "constant":
        windows = _mirrored(x, mask, halo, border.mode, hidden)
    else:
        windows = gather_windows(x, mask, halo, hidden)
        if border.value != hidden and max(sides) > 0:
            windows = torch.where(beyond(mask, side, halo, NOTHING), border.value, windows)
        all_hidden = max(sides) <= 0 or border.value == hidden  # outside the image, so far
        if all_hidden and min(sides) >= 0 and outside == hidden:
            return windows
    return torch.where(beyond(mask, side, halo, border), outside, windows)


def beyond(mask: BlockMask, side: int, halo: Sequence[int], border: Border) -> Tensor:
    """Which positions of the windows lie neither in the image nor in its border.

    Returns:
        bool `[T, rows, columns, 1]`.
    """
    rows, columns = _positions(mask, side, halo)
    height, width = (n * side for n in mask.grid)
    row = (rows < -border.top) | (rows >= height + border.bottom)
    column = (columns < -border.left) | (columns >= width + border.right)
    return (row.unsqueeze(2) | column.unsqueeze(1)).unsqueeze(3)


def _positions(mask: BlockMask, side: int, halo: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The rows and the columns of the image in each window: int64 `[T, rows]`, `[T, columns]`."""
    top, bottom, left, right = halo
    row, column = block_places(mask)
    rows = torch.arange(-top, side + bottom, device=mask.device)
    columns = torch.arange(-left, side + right, device=mask.device)
    return row.unsqueeze(1) * side + rows, column.unsqueeze(1) * side + columns


def block_places(mask: BlockMask) -> tuple[Tensor, Tensor]:
    """The row and the column of every visible block in the grid: int64 `[T]` each."""
    gh, gw = mask.grid
    place = mask.block_index % (gh * gw)
    return place // gw, place % gw


def _mirrored(
    x: Tensor, mask: BlockMask, halo: tuple[int, int, int, int], mode: str, hidden: float
) -> Tensor:
    """The windows; what lies outside the image is what lies inside it at the mirrored place."""
    side = block_side(x.shape[1])
    # As far as a window reaches out of the image above, its mirror image reaches down into it.
    down, up, right, left = (max(0, reach - side + 1) for reach in halo)
    grown = tuple(map(max, halo, (up, down, left, right)))
    windows = gather_windows(x, mask, (grown[0], grown[1], grown[2], grown[3]), hidden)
    indices = []
    for positions, number, first in zip(
        _positions(mask, side, halo), mask.grid, (grown[0] - halo[0], grown[2] - halo[2])
    ):
        last = number * side - 1
        source = positions.clamp(0, last)
        if mode == "reflect":
            source = 2 * source - positions
        here = torch.arange(first, first + positions.shape[1], device=mask.device)
        indices.append(here + source - positions)
    rows, columns = indices
    rows = rows.clamp(0, windows.shape[1] - 1)  # beyond the border they may point anywhere
    columns = columns.clamp(0, windows.shape[2] - 1)
    block = torch.arange(x.shape[0], device=mask.device)
    return windows[block[:, None, None], rows[:, :, None], columns[:, None, :]]
