"""Batches of chosen numbers, with the name of every picture: what tables are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from convmae.data.errors import UnreadableError
from convmae.data.picture import NO_LABEL, ChosenPicture

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from convmae.data.picture import Photos
    from convmae.data.transforms import Transform


class NamedBatch(NamedTuple):
    """Pictures `number * batch_size` to the next batch's, in the order of the data set."""

    number: int
    images: Tensor
    """uint8, uint16 or float32 `[N, C, H, W]`, as stored; zeros where one could not be read."""
    names: list[str]
    """Relative to the source's root."""
    labels: Tensor
    """int64 `[N]`; -1 where there is none."""
    reasons: list[str]
    """Why a picture could not be read; empty where it could."""


class NamedPicture(NamedTuple):
    """A picture that is not read yet."""

    name: str
    label: int
    load: Callable[[], Tensor]
    """Its image, or an `UnreadableError`."""


def named_batch(
    number: int,
    pictures: Iterable[NamedPicture],
    size: tuple[int, int],
    channels: int,
    dtype: torch.dtype,
) -> NamedBatch:
    """Reads pictures; one that cannot be read, or is not like the others, is zeros."""
    images, names, labels, reasons = [], [], [], []
    for name, label, load in pictures:
        image, reason = torch.zeros(channels, *size, dtype=dtype), ""
        try:
            found = load()
            if (len(found), found.dtype) != (channels, dtype):
                raise UnreadableError(
                    f"{len(found)} channels of {_name(found.dtype)}, where other pictures have "
                    f"{channels} of {_name(dtype)}"
                )
            image = found.contiguous()
        except UnreadableError as error:
            reason = str(error) or "it cannot be read"
        images.append(image)
        names.append(name)
        labels.append(label)
        reasons.append(reason)
    return NamedBatch(number, torch.stack(images), names, torch.tensor(labels), reasons)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class NamedDataset(Dataset[NamedBatch]):
    """Batches of pictures by index.

    Args:
        photos: where the pictures come from.
        transform: what is made of a picture; it draws no random numbers.
        root: what the names of the pictures begin with, and those of the batches do not.
        labelled: whether to give the labels.
    """

    def __init__(
        self, photos: Photos, transform: Transform, root: str = "", labelled: bool = True
    ) -> None:
        self.photos, self.transform = photos, transform
        self.root, self.labelled = root, labelled

    def __getitems__(self, numbered: tuple[int, range]) -> NamedBatch:
        number, indices = numbered
        channels, dtype = self.photos.channels, self.photos.dtype
        return named_batch(
            number, map(self._picture, indices), self.transform.size, channels, dtype
        )

    def _picture(self, index: int) -> NamedPicture:
        name = self.photos.name(index).removeprefix(self.root)
        label = self.photos.label(index) if self.labelled else NO_LABEL
        return NamedPicture(name, label, lambda: self.transform(ChosenPicture(self.photos, index)))


def numbered_ranges(
    numbers: Sequence[int], batch_size: int, pictures: int
) -> Iterator[tuple[int, range]]:
    """Of each batch its number and the indices of its pictures; the last may have fewer."""
    for number in numbers:
        start = number * batch_size
        yield number, range(start, min(start + batch_size, pictures))


def contiguous_runs(numbers: Sequence[int]) -> Iterator[range]:
    """Sorted numbers as ranges: `1, 2, 3, 7 -> range(1, 4), range(7, 8)`."""
    start = 0
    for place in range(1, len(numbers) + 1):
        if place == len(numbers) or numbers[place] != numbers[place - 1] + 1:
            yield range(numbers[start], numbers[place - 1] + 1)
            start = place
