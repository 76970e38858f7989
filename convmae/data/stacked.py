"""Pictures of which each lies in several folders, such as RGB and infrared: stacked channels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from convmae.data.errors import DataError, UnreadableError
from convmae.data.picture import NO_LABEL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from convmae.data.crops import Box, PickBox, Size
    from convmae.data.picture import Photos


class StackedPhotos:
    """Picture `i` has the channels of picture `i` of all `parts`, in their order.

    Args:
        parts: as many pictures each, of the same dtype.

    Raises:
        DataError: their dtypes differ.
    """

    def __init__(self, parts: Sequence[Photos]) -> None:
        self.parts = list(parts)
        self.channels, self.dtype = sum(part.channels for part in parts), parts[0].dtype
        for part in parts:
            if part.dtype != self.dtype:
                kinds = [str(each.dtype).removeprefix("torch.") for each in parts]
                raise DataError(
                    f"pictures of {' and '.join(kinds)} cannot be stacked (the first are "
                    f"{parts[0].name(0)} and {part.name(0)}); expected one type of values in all "
                    "folders"
                )

    def __len__(self) -> int:
        return len(self.parts[0])

    def name(self, index: int) -> str:
        return self.parts[0].name(index)

    def label(self, index: int) -> int:
        return NO_LABEL

    def load(self, index: int) -> Tensor:
        """The whole picture, `[C, h, w]`.

        Raises:
            UnreadableError: a part cannot be decoded, or their sizes differ.
        """
        return self._together([part.load(index) for part in self.parts])

    def measured(self, index: int) -> Tensor:
        """`load` in float32, with NaN where there are no data.

        Raises:
            UnreadableError: a part cannot be decoded, or their sizes differ.
        """
        return self._together([part.measured(index) for part in self.parts])

    def crop(self, index: int, pick: PickBox, size: Size) -> Tensor:
        """`resize(picture[pick(h, w)], size)`, `[C, H, W]`; the same box of all parts.

        Raises:
            UnreadableError: a part cannot be decoded, or their sizes differ.
        """
        picked: list[tuple[Size, Box]] = []

        def once(height: int, width: int) -> Box:
            if not picked:
                picked.append(((height, width), pick(height, width)))
            (known, box), found = picked[0], (height, width)
            if found != known:
                raise UnreadableError(_differing([known, found]))
            return box

        return torch.cat([part.crop(index, once, size) for part in self.parts])

    def _together(self, images: list[Tensor]) -> Tensor:
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        if len(set(sizes)) > 1:
            raise UnreadableError(_differing(sizes))
        return torch.cat(images)


def _differing(sizes: list[Size]) -> str:
    words = " and ".join(f"{height} x {width}" for height, width in sizes)
    return f"its pictures in the folders that are stacked have {words} pixels; expected one size"
