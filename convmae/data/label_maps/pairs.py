"""Pictures with label maps: opened, checked as a whole before a run, and read by index."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from convmae.config.label_maps import IGNORED
from convmae.data.crops import resized_crop
from convmae.data.errors import DataError, Failure, UnreadableError, check_share
from convmae.data.fingerprint import file_entries
from convmae.data.formats.decode import EncodedPicture
from convmae.data.label_maps.layout import NAMED_AT_MOST, find_files, find_places
from convmae.data.label_maps.values import LabelError, LabelReading, read_label_map
from convmae.data.loader import default_workers
from convmae.data.open import open_files
from convmae.data.picture import NO_LABEL
from convmae.data.source import PhotoSource
from convmae.seeds import Stream, generator_for

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from convmae.config.data import ReadOptions
    from convmae.config.label_maps import LabelMapConfig
    from convmae.data.crops import PickBox, Size
    from convmae.data.label_maps.layout import Files
    from convmae.data.picture import Photos

SECOND_CHANNELS = 1
MANY = 2000  # label maps whose reading is announced
THREADS = 8


class StackedPhotos:
    """Two pictures of the same size as one: the channels of the first, then of the second.

    Raises:
        DataError: their values are of different types.
    """

    def __init__(self, first: Photos, second: Photos) -> None:
        self.first, self.second = first, second
        if first.dtype != second.dtype:
            kinds = [str(photos.dtype).removeprefix("torch.") for photos in (first, second)]
            raise DataError(
                f"--second_images are of {kinds[1]}, but the first pictures of {kinds[0]}; "
                "expected values of the same type, to be stacked as channels"
            )
        self.channels, self.dtype = first.channels + second.channels, first.dtype

    def __len__(self) -> int:
        return len(self.first)

    def name(self, index: int) -> str:
        return self.first.name(index)

    def label(self, index: int) -> int:
        return self.first.label(index)

    def load(self, index: int) -> Tensor:
        """Both pictures whole, `[C, h, w]`.

        Raises:
            UnreadableError: one cannot be read, or their sizes differ.
        """
        return self._stacked(self.first.load(index), self.second.load(index), index)

    def measured(self, index: int) -> Tensor:
        """`load` in float32, with NaN where there are no data."""
        return self._stacked(self.first.measured(index), self.second.measured(index), index)

    def crop(self, index: int, pick: PickBox, size: Size) -> Tensor:
        """`resize(pictures[pick(h, w)], size)`, `[C, H, W]`."""
        image = self.load(index)
        return resized_crop(image, pick(image.shape[1], image.shape[2]), size)

    def _stacked(self, first: Tensor, second: Tensor, index: int) -> Tensor:
        if first.shape[1:] != second.shape[1:]:
            sizes = [" x ".join(map(str, image.shape[1:])) for image in (first, second)]
            raise UnreadableError(
                f"it has {sizes[0]} pixels, but {self.second.name(index)} has {sizes[1]}"
            )
        return torch.cat([first, second])


class LabelMapPhotos:
    """Pictures, each with its label map as target.

    Args:
        photos: the pictures.
        labels: the label map of each.
        reading: what their values mean.
        count: the classes that there are; more are refused.
    """

    def __init__(
        self, photos: Photos, labels: Sequence[Path], reading: LabelReading, count: int = IGNORED
    ) -> None:
        self.photos, self.labels, self.reading = photos, list(labels), reading
        self.count = count
        self.channels, self.dtype = photos.channels, photos.dtype

    def __len__(self) -> int:
        return len(self.photos)

    def name(self, index: int) -> str:
        return self.photos.name(index)

    def label(self, index: int) -> int:
        return NO_LABEL

    def load(self, index: int) -> Tensor:
        return self.photos.load(index)

    def measured(self, index: int) -> Tensor:
        return self.photos.measured(index)

    def crop(self, index: int, pick: PickBox, size: Size) -> Tensor:
        return self.photos.crop(index, pick, size)

    def target(self, index: int) -> Tensor:
        """The label map of picture `index`, uint8 `[h, w]`; 255 counts for nothing.

        Raises:
            UnreadableError: it cannot be read, or has a class that there is not.
        """
        path = self.labels[index]
        try:
            values = read_label_map(path, self.reading)
        except UnreadableError as error:
            raise UnreadableError(f"its label map {path}: {error}") from error
        largest = int(values[values != IGNORED].max(initial=0))
        if largest >= self.count:
            raise UnreadableError(
                f"its label map {path} has class {largest}; expected 0 to {self.count - 1}"
            )
        return torch.from_numpy(values)


def open_label_maps(
    data_path: str,
    split: str,
    options: LabelMapConfig,
    reading: ReadOptions,
    max_unreadable: float = 0.1,
    max_samples: int | None = None,
    seed: int = 0,
    undivided: bool = False,
) -> PhotoSource:
    """The pictures of a split with their label maps; headers of pictures are checked.

    Args:
        data_path, split, options, undivided: see `convmae.data.label_maps.layout.find_places`.
        reading: how pictures are read; its `in_chans` and `bands` are of the first of two.
        max_unreadable: share of unreadable pictures above which they are refused.
        max_samples: take this many of the pictures only.
        seed: of the choice of these.

    Raises:
        DataError: files are missing or there twice, too many are unreadable, or options that mean
            nothing for these pictures.
    """
    places = find_places(data_path, split, options, undivided)
    files = find_files(places, options)
    if max_samples is not None:
        files = _chosen(files, max_samples, seed)
    channels = options.second_chans or SECOND_CHANNELS
    where = str(places.images)
    source = open_pairs(files.images, files.second, where, reading, channels, max_unreadable)
    source.photos = LabelMapPhotos(source.photos, files.labels, LabelReading.of(options, reading))
    source.left_out = files.left_out
    source.root = os.path.join(Path(data_path).expanduser(), "")
    names = "" if places.names is None else f", named in {places.names}"
    source.description += f"; label maps in {places.labels}{names}"
    every = [*files.images, *files.second, *files.labels]
    source.entries = lambda: file_entries(every, Path(data_path).expanduser())
    return source


def open_pairs(
    paths: list[Path],
    second: list[Path],
    where: str,
    reading: ReadOptions,
    second_channels: int = SECOND_CHANNELS,
    max_unreadable: float = 0.1,
) -> PhotoSource:
    """Pictures without labels, with the channels of a second picture each if there are any.

    Args:
        paths: the pictures.
        second: one for each, or none.
        where: the pictures lie, for messages.
        reading: how they are read; its `in_chans` and `bands` are of the first of two.
        second_channels: of each second picture.
        max_unreadable: share of unreadable pictures above which they are refused.

    Raises:
        DataError: too many are unreadable, or values of the two are of different types.
    """
    photos, failures, description, notes = _photos(paths, where, max_unreadable, reading)
    if second:
        there = str(second[0].parent)
        others = dataclasses.replace(reading, in_chans=second_channels, bands=None)
        more, broken, other, more_notes = _photos(second, there, max_unreadable, others)
        photos = StackedPhotos(photos, more)
        partner = {str(two): str(one) for one, two in zip(paths, second, strict=True)}
        failures = [*failures, *(Failure(partner[name], f"{name}: {why}") for name, why in broken)]
        description, notes = f"{description} with {other}", [*notes, *more_notes]
    return PhotoSource(
        photos,
        description="; ".join([description, *notes]),
        workers=default_workers(),
        failures=failures,
        max_unreadable=max_unreadable,
        root=os.path.join(where, ""),
    )


def _photos(
    paths: list[Path], where: str, max_unreadable: float, reading: ReadOptions
) -> tuple[Photos, list[Failure], str, list[str]]:
    """One picture of each file; see `open_files`."""
    photos, failures, description, notes = open_files(paths, None, where, max_unreadable, reading)
    if len(photos) != len(paths):
        raise DataError(
            f"{where} has arrays of many pictures; expected one picture in a file, so that each "
            "has its label map"
        )
    return photos, failures, description, notes


def _chosen(files: Files, count: int, seed: int) -> Files:
    """`count` of the pictures, with what belongs to them."""
    total = len(files.images)
    if count > total:
        raise DataError(
            f"--max_samples must be in [1, {total}], the number of pictures, got {count}"
        )
    order = torch.randperm(total, generator=generator_for(seed, Stream.CHOICE)).tolist()
    chosen = sorted(order[:count])
    images, labels, second = (
        [part[index] for index in chosen] if part else []
        for part in (files.images, files.labels, files.second)
    )
    return dataclasses.replace(files, images=images, labels=labels, second=second)


# -- the check before a run -----------------------------------------------------------------------


@dataclass
class LabelSurvey:
    """What all label maps of a split hold.

    Attributes:
        pixels: int64 `[256]`, pixels of each class; 255 those that count for nothing.
        largest: the label maps whose largest class is this one.
        failures: pictures whose label maps cannot be decoded.
        total: how many label maps there are.
        seconds: what reading them took.
    """

    pixels: np.ndarray
    largest: dict[int, list[str]]
    failures: list[Failure]
    total: int
    seconds: float


def survey_label_maps(source: PhotoSource, data: str) -> LabelSurvey:
    """Reads all label maps once, and compares their sizes with those of the pictures.

    Args:
        source: what `open_label_maps` gave.
        data: what to call it in messages.

    Raises:
        DataError: label maps of another size than their pictures, with colours or values that are
            no classes, or too many that cannot be decoded; the message names files.
    """
    photos = source.photos
    assert isinstance(photos, LabelMapPhotos)
    began, total = time.perf_counter(), len(photos)
    if total >= MANY:
        print(f"reading the {total:,} label maps of {data} once, to check them", file=sys.stderr)
    pixels = np.zeros(256, np.int64)
    largest: dict[int, list[str]] = {}
    wrong: list[Failure] = []
    broken: list[Failure] = []
    known = {failure.name for failure in source.failures}
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(_look_at(photos, known), range(total))
        for index, result in enumerate(found):
            path = str(photos.labels[index])
            if isinstance(result, LabelError):
                wrong.append(Failure(path, str(result)))
            elif isinstance(result, UnreadableError):
                broken.append(Failure(photos.name(index), f"its label map {path}: {result}"))
            else:
                pixels += result
                classes = np.flatnonzero(result[:IGNORED])
                if len(classes):
                    largest.setdefault(int(classes[-1]), []).append(path)
    if wrong:
        first = "; ".join(f"{name}: {reason}" for name, reason in wrong[:NAMED_AT_MOST])
        more = f"; and {len(wrong) - NAMED_AT_MOST:,} more" if len(wrong) > NAMED_AT_MOST else ""
        raise DataError(
            f"{len(wrong):,} of {total:,} label maps of {data} cannot be used: {first}{more}"
        )
    check_share([*source.failures, *broken], total, source.max_unreadable)
    return LabelSurvey(pixels, largest, broken, total, time.perf_counter() - began)


def _look_at(
    photos: LabelMapPhotos, known: set[str]
) -> Callable[[int], np.ndarray | UnreadableError]:
    """Of a picture the pixels of each class in its label map, or what is wrong with that."""

    def look(index: int) -> np.ndarray | UnreadableError:
        try:
            values = read_label_map(photos.labels[index], photos.reading)
        except UnreadableError as error:
            return error
        names = [photos.name(index)]
        if isinstance(photos.photos, StackedPhotos):
            names.append(photos.photos.second.name(index))
        for name in names if names[0] not in known else ():
            try:
                size = EncodedPicture(Path(name), photos.reading.pictures).size()
            except UnreadableError:
                size = values.shape  # of arrays with axes that an option tells
            if size != values.shape:
                height, width = values.shape
                return LabelError(
                    f"it has {height} x {width} pixels, but the picture {name} has "
                    f"{size[0]} x {size[1]}"
                )
        return np.bincount(values.ravel(), minlength=256)

    return look
