"""A picture, to be loaded whole or cropped and resized, and pictures by index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from convmae.data.crops import resized_crop
from convmae.data.formats.stored import Stored, finish

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from convmae.config.data import ReadOptions
    from convmae.data.crops import PickBox, Size

NO_LABEL = -1


class Picture(Protocol):
    """One picture that is decoded when it is used."""

    def load(self) -> Tensor:
        """The whole picture as stored, `[C, h, w]`.

        Raises:
            UnreadableError: the picture cannot be decoded.
        """

    def measured(self) -> Tensor:
        """`load` in float32, with NaN where there are no data.

        Raises:
            UnreadableError: the picture cannot be decoded.
        """

    def crop(self, pick: PickBox, size: Size) -> Tensor:
        """`resize(picture[pick(h, w)], size)`, `[C, H, W]`, bicubic, antialiased, same dtype.

        Raises:
            UnreadableError: the picture cannot be decoded.
        """


class Photos(Protocol):
    """Pictures by index: all of the same number of channels and dtype."""

    @property
    def channels(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype:
        """uint8, uint16 or float32."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call picture `index` in messages."""

    def label(self, index: int) -> int:
        """The class of picture `index`, or -1."""

    def load(self, index: int) -> Tensor:
        """Picture `index` as stored, `[C, h, w]`.

        Raises:
            UnreadableError: the picture cannot be decoded.
        """

    def measured(self, index: int) -> Tensor:
        """`load` in float32, with NaN where there are no data.

        Raises:
            UnreadableError: the picture cannot be decoded.
        """

    def crop(self, index: int, pick: PickBox, size: Size) -> Tensor:
        """`resize(picture[pick(h, w)], size)`, `[C, H, W]`, bicubic, antialiased, same dtype.

        Raises:
            UnreadableError: the picture cannot be decoded.
        """


class TargetPhotos(Photos, Protocol):
    """Pictures each of which has a target: a label map, or the objects in it."""

    def target(self, index: int) -> Any:
        """What belongs to picture `index`, as stored.

        Raises:
            UnreadableError: it cannot be read.
        """


@dataclass(frozen=True)
class ChosenPicture:
    """Picture `index` of `photos`."""

    photos: Photos
    index: int

    def load(self) -> Tensor:
        return self.photos.load(self.index)

    def measured(self) -> Tensor:
        return self.photos.measured(self.index)

    def crop(self, pick: PickBox, size: Size) -> Tensor:
        return self.photos.crop(self.index, pick, size)

    def target(self) -> Any:
        """What belongs to the picture, of photos that have targets (`TargetPhotos`).

        Raises:
            UnreadableError: it cannot be read.
        """
        return self.photos.target(self.index)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Pixels:
    """A decoded picture, `[C, h, w]`."""

    image: Tensor

    def load(self) -> Tensor:
        return self.image

    def measured(self) -> Tensor:
        return self.image.float()

    def crop(self, pick: PickBox, size: Size) -> Tensor:
        return resized_crop(self.image, pick(self.image.shape[1], self.image.shape[2]), size)


@dataclass(frozen=True)
class WithChannels:
    """8-bit grey or RGB pictures with another number of channels, 1 or 3."""

    photos: Photos
    reading: ReadOptions

    @property
    def channels(self) -> int:
        return self.photos.channels if self.reading.in_chans is None else self.reading.in_chans

    @property
    def dtype(self) -> torch.dtype:
        return self.photos.dtype

    def __len__(self) -> int:
        return len(self.photos)

    def name(self, index: int) -> str:
        return self.photos.name(index)

    def label(self, index: int) -> int:
        return self.photos.label(index)

    def load(self, index: int) -> Tensor:
        return self._converted(self.photos.load(index))

    def measured(self, index: int) -> Tensor:
        return self.load(index).float()

    def crop(self, index: int, pick: PickBox, size: Size) -> Tensor:
        return self._converted(self.photos.crop(index, pick, size))

    def _converted(self, image: Tensor) -> Tensor:
        return finish(Stored(image.numpy(), photo=True), self.reading)


@dataclass(frozen=True)
class Subset:
    """The pictures `indices` of `photos`."""

    photos: Photos
    indices: Sequence[int]

    @property
    def channels(self) -> int:
        return self.photos.channels

    @property
    def dtype(self) -> torch.dtype:
        return self.photos.dtype

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.photos.name(self.indices[index])

    def label(self, index: int) -> int:
        return self.photos.label(self.indices[index])

    def load(self, index: int) -> Tensor:
        return self.photos.load(self.indices[index])

    def measured(self, index: int) -> Tensor:
        return self.photos.measured(self.indices[index])

    def crop(self, index: int, pick: PickBox, size: Size) -> Tensor:
        return self.photos.crop(self.indices[index], pick, size)

    def target(self, index: int) -> Any:
        """That of a picture of `photos` (`TargetPhotos`)."""
        return self.photos.target(self.indices[index])  # type: ignore[attr-defined]
