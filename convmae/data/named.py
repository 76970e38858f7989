"""Batches of chosen numbers, with the name of every picture: what tables are made of."""

from __future__ import annotations

import os
from bisect import bisect_right
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from convmae.data.errors import UnreadableError
from convmae.data.loader import run_batches
from convmae.data.picture import NO_LABEL, ChosenPicture
from convmae.data.samples import (
    all_shards,
    class_number,
    decode_sample,
    read_in_order,
    sample_label,
)
from convmae.data.source import PhotoSource
from convmae.data.stream import ShardSource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from convmae.data.samples import RawSample
    from convmae.data.source import Source
    from convmae.data.transforms import Transform


class NamedBatch(NamedTuple):
    """Pictures `number * batch_size` to the next batch's, in the order of the data set."""

    number: int
    images: Tensor
    """uint8, uint16 or float32 `[N, C, H, W]`, as stored; zeros where one could not be read."""
    names: list[str]
    """Without what the names of all have in common; see `named_batches`."""
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


def named_batches(
    source: Source,
    transform: Transform,
    batch_size: int,
    numbers: Sequence[int],
    workers: int | None = None,
    pin: bool = False,
    labelled: bool = True,
) -> Iterator[NamedBatch]:
    """The batches `numbers` of pictures in their order, with names; shards give them in any order.

    Batch `b` holds pictures `b * batch_size` to `(b + 1) * batch_size - 1`; there are
    `source.evaluation_steps(batch_size)`, and the last has what is left. A picture that cannot be
    read is zeros under its own name, with the reason. Names are paths below the folder that was
    opened, `file.npy[place]` of many pictures in a file, or `shard.tar/key`.

    Args:
        source: the pictures.
        transform: what is made of a picture; it draws no random numbers.
        batch_size: pictures in a batch.
        numbers: which batches, sorted.
        workers: loading processes; the source's default if None.
        pin: page-locked batches.
        labelled: give the labels that there are; otherwise all are -1.

    Raises:
        DataError: pictures that the transform cannot take.
    """
    transform.check(source.channels, source.dtype)
    workers = source.workers if workers is None else workers
    if isinstance(source, ShardSource):
        stream = _Stream(source, transform, batch_size, numbers, labelled)
        return run_batches(stream, None, workers, pin)
    assert isinstance(source, PhotoSource)
    ends = ((number, (number + 1) * batch_size) for number in numbers)
    places: Any = ((n, range(n * batch_size, min(end, source.pictures))) for n, end in ends)
    return run_batches(_Photos(source, transform, labelled), places, workers, pin)


def files_of(source: Source) -> list[str]:
    """The files and addresses that hold the pictures, where there are any."""
    if isinstance(source, ShardSource):
        return list(source.shards.names)
    return [str(path) for path in getattr(getattr(source, "photos", None), "paths", ())]


def _shared_folder(names: Sequence[str]) -> str:
    """What the paths or addresses have in common, up to a slash."""
    shared = os.path.commonprefix(names)
    return shared[: shared.rfind("/") + 1]


class _Photos(Dataset[NamedBatch]):
    """Batches of pictures by index."""

    def __init__(self, source: PhotoSource, transform: Transform, labelled: bool) -> None:
        self.photos, self.root = source.photos, source.root
        self.transform, self.labelled = transform, labelled

    def __getitems__(self, place: tuple[int, range]) -> NamedBatch:
        number, indices = place
        size, photos = self.transform.size, self.photos
        return named_batch(number, map(self._picture, indices), size, photos.channels, photos.dtype)

    def _picture(self, index: int) -> NamedPicture:
        name = self.photos.name(index).removeprefix(self.root)
        label = self.photos.label(index) if self.labelled else NO_LABEL
        return NamedPicture(name, label, lambda: self.transform(ChosenPicture(self.photos, index)))


class _Stream(IterableDataset[NamedBatch]):
    """Batches of samples of shards, each loading process a contiguous share of them."""

    def __init__(
        self,
        source: ShardSource,
        transform: Transform,
        batch_size: int,
        numbers: Sequence[int],
        labelled: bool,
    ) -> None:
        self.shards, self.kind, self.transform = source.shards, source.kind, transform
        self.batch_size, self.numbers, self.labelled = batch_size, numbers, labelled
        self._root = _shared_folder(self.shards.names)
        self._ends = torch.tensor(self.shards.sizes).cumsum(0).tolist()

    def __iter__(self) -> Iterator[NamedBatch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        total, size, kind = len(self.numbers), self.batch_size, self.kind
        own = self.numbers[total * worker // workers : total * (worker + 1) // workers]
        order = all_shards(self.shards)
        for run in contiguous_runs(own):
            low = run.start * size
            count = min(run.stop * size, self._ends[-1]) - low
            samples = read_in_order(self.shards, order, 0, low, count, frozenset())
            for number in run:
                pictures = map(self._picture, islice(samples, size))
                yield named_batch(number, pictures, self.transform.size, kind.channels, kind.dtype)

    def _picture(self, raw: RawSample) -> NamedPicture:
        label = NO_LABEL
        if self.labelled:
            with suppress(UnreadableError):  # a picture without a label is a picture
                label = class_number(sample_label(raw), self.kind, raw.name)
        shard = self.shards.names[bisect_right(self._ends, raw.sample)]
        name = f"{shard.removeprefix(self._root)}/{raw.name.removeprefix(f'{shard}: ')}"

        def load() -> Tensor:
            return self.transform(decode_sample(raw, self.kind.reading)[0])

        return NamedPicture(name, label, load)


def contiguous_runs(numbers: Sequence[int]) -> Iterator[range]:
    """Sorted numbers as ranges: `1, 2, 3, 7 -> range(1, 4), range(7, 8)`."""
    start = 0
    for place in range(1, len(numbers) + 1):
        if place == len(numbers) or numbers[place] != numbers[place - 1] + 1:
            yield range(numbers[start], numbers[place - 1] + 1)
            start = place
