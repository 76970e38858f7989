"""Samples of shards one by one, not decoded yet: read in any order, their pictures and labels."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from convmae.data.archive import (
    ARCHIVE_ERRORS,
    PICTURES,
    error_reason,
    is_address,
    open_shard,
    read_member,
    read_samples,
)
from convmae.data.errors import DataError, UnreadableError
from convmae.data.folder import differs
from convmae.data.formats.decode import EncodedPicture
from convmae.data.formats.stored import Kind
from convmae.data.labels import LABEL, LabelReader, label_text
from convmae.data.picture import NO_LABEL
from convmae.data.sizes import SIZES_FILE, SIZES_HELP
from convmae.data.source import ExpectedLabels, evenly_spaced

if TYPE_CHECKING:
    import tarfile
    from collections.abc import Iterator, Sequence
    from collections.abc import Set as AbstractSet

    from convmae.config.data import ReadOptions
    from convmae.data.shards import Shards


LABELS_BELOW = 2**63  # those that an int64 holds
SAMPLED_SHARDS = 64  # of more shards, an even sample of this many stands for all


class RawSample(NamedTuple):
    """A sample that is not decoded yet, or why there is none."""

    epoch: int
    sample: int
    """Its number: samples of all shards, counted in the order of the shards' names."""
    name: str
    content: dict[str, bytes] | None = None
    reason: str = ""


class SampleKind(NamedTuple):
    """What the samples of a source have in common."""

    channels: int
    dtype: torch.dtype
    reading: ReadOptions
    reader: LabelReader | None
    """Of their labels; None if there are none."""
    expected: ExpectedLabels | None = None
    """What labels have to be; None where a sample may be without."""


def decode_sample(raw: RawSample, reading: ReadOptions) -> tuple[EncodedPicture, str | None]:
    """The picture of a sample, and its label as text.

    Raises:
        UnreadableError: there is none.
    """
    if raw.content is None:
        raise UnreadableError(raw.reason)
    suffix = next(suffix for suffix in raw.content if suffix in PICTURES)
    return EncodedPicture(raw.content[suffix], reading), sample_label(raw)


def check_alike(kind: Kind, wanted: SampleKind) -> None:
    """Raises `UnreadableError` where a picture is not like those of the data set."""
    if kind != (wanted.channels, wanted.dtype):
        raise UnreadableError(differs(kind, Kind(wanted.channels, wanted.dtype)))


def sample_label(raw: RawSample) -> str | None:
    """The label of a sample as text, None if it has none."""
    text = None if raw.content is None else raw.content.get(LABEL)
    return None if text is None else label_text(text)


def class_number(text: str | None, kind: SampleKind, name: str) -> int:
    """The number of the label `text` of the sample `name`; -1 if it has none and needs none.

    Raises:
        UnreadableError: one is needed, and it is missing, or no number or name of a class.
        DataError: it is a number that the model has no class for.
    """
    if kind.reader is None:
        return NO_LABEL
    try:
        number = kind.reader.number(text)
    except UnreadableError:
        if kind.expected is not None:
            raise
        return NO_LABEL
    if kind.expected is not None:
        return kind.expected.number(number, name)
    return number if number < LABELS_BELOW else NO_LABEL


def read_shard(
    name: str,
    size: int,
    start: int,
    stop: int,
    offset: int,
    epoch: int,
    wanted: AbstractSet[int],
) -> Iterator[RawSample]:
    """Samples `start` to `stop - 1` of a shard; always that many.

    Args:
        name: path or address.
        size: samples in the shard.
        start, stop: which of them.
        offset: number of the shard's first sample.
        epoch: yielded with each sample.
        wanted: the samples of the shard whose contents are needed.

    Raises:
        DataError: the shard holds more than `size` samples.
    """
    done, reason = start, f"the shard ends before its {size} samples"
    try:
        with open_shard(name) as (archive, stream):
            samples = read_samples(archive, stream, name, read=is_address(name))
            for index, sample in enumerate(islice(samples, stop)):
                if index < start:
                    continue
                label = f"{name}: {sample['__key__']}"
                content, problem = None, ""
                if index in wanted:
                    try:
                        content = _contents(archive, sample)
                    except UnreadableError as error:
                        problem = str(error)
                yield RawSample(epoch, offset + index, label, content, problem)
                done = index + 1
            if stop == size and done == stop and next(samples, None) is not None:
                raise DataError(
                    f"{name} holds more than {size} samples, which {SIZES_FILE} or its headers "
                    f"said; if it has one, write {SIZES_FILE} again: {SIZES_HELP}"
                )
    except DataError:
        raise
    except ARCHIVE_ERRORS as error:
        reason = error_reason(error)
    for index in range(done, stop):
        yield RawSample(epoch, offset + index, f"{name}: sample {index}", None, reason)


def _contents(archive: tarfile.TarFile, sample: dict[str, Any]) -> dict[str, bytes]:
    """The picture of a sample, and its label if it has one.

    Raises:
        UnreadableError: the picture announces more than one may have.
    """
    contents = {}
    for suffix, value in sample.items():
        if isinstance(value, UnreadableError):
            raise value
        if suffix in PICTURES or suffix == LABEL:
            contents[suffix] = value if isinstance(value, bytes) else read_member(archive, value)
    return contents


def read_in_order(
    shards: Shards, order: list[int], epoch: int, low: int, count: int, skipped: AbstractSet[int]
) -> Iterator[RawSample]:
    """Samples `low` to `low + count - 1` of the shards in `order`, then fillers without a name.

    The contents of those at the places `skipped`, counted from `low`, are not read.
    """
    offsets = torch.tensor((0, *shards.sizes)).cumsum(0).tolist()
    place = 0
    for number in order:
        size = shards.sizes[number]
        start, stop = max(low - place, 0), min(low + count - place, size)
        if start < stop:
            wanted = {index for index in range(start, stop) if index + place - low not in skipped}
            part = (size, start, stop, offsets[number])
            yield from read_shard(shards.names[number], *part, epoch, wanted)
        place += size
    for sample in range(max(low, place), low + count):
        yield RawSample(epoch, sample, "")


def read_chosen(shards: Shards, numbers: Sequence[int]) -> Iterator[RawSample]:
    """The samples `numbers`, in rising order; what lies between them is passed over."""
    offset = 0
    for name, size in zip(shards.names, shards.sizes):
        first = bisect_left(numbers, offset)
        wanted = [
            number - offset for number in numbers[first : bisect_left(numbers, offset + size)]
        ]
        if wanted:
            chosen = frozenset(wanted)
            for raw in read_shard(name, size, wanted[0], wanted[-1] + 1, offset, 0, chosen):
                if raw.sample - offset in chosen:
                    yield raw
        offset += size


def chosen_samples(shards: Shards, count: int) -> list[int]:
    """Up to `count` samples of `SAMPLED_SHARDS` shards at most, which are evenly spaced.

    Of files these are evenly spaced too; at an address, where all that lies before a sample has to
    be fetched, they are the first of each shard.
    """
    offsets = [0, *accumulate(shards.sizes)]
    filled = [number for number, size in enumerate(shards.sizes) if size]
    chosen = [filled[place] for place in evenly_spaced(len(filled), SAMPLED_SHARDS)]
    if any(is_address(shards.names[number]) for number in chosen):
        each = [-(-count // len(chosen))] * len(chosen)
    else:
        each = [shards.sizes[number] for number in chosen]
    samples = [
        offsets[number] + place
        for number, limit in zip(chosen, each)
        for place in range(min(limit, shards.sizes[number]))
    ]
    return [samples[place] for place in evenly_spaced(len(samples), count)]


def all_shards(shards: Shards) -> list[int]:
    """The numbers of the shards, in order."""
    return list(range(len(shards.names)))
