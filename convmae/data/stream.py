"""Shards read as a stream: shuffled, shared among processes, and resumable at any batch.

The order of epoch `e` is that of its shards, shuffled by `(seed, e)`, one after the other. It is
cut into contiguous ranges, one for each loading process of each rank, whatever the sizes of the
shards: so all ranks have as many batches, no sample comes twice, and those after the last whole
batch are dropped. A loading process reads its range, through a buffer that shuffles by
`(seed, e, process)`. Where a run goes on, the samples before are passed over without being decoded,
and in local shards without being read.

Nothing is lost silently. A sample that cannot be decoded is reported and replaced by the next that
can. A shard that ends early is found when its headers are counted, and reported then; where an
address yields less than `sizes.json` says, each sample that is missing is reported and replaced.
"""

from __future__ import annotations

import random
import time
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from convmae.data.decode import EncodedPicture
from convmae.data.errors import DataError, Failure, UnreadableError, check_share
from convmae.data.folder import (
    LOOKED_AT,
    PHOTO,
    check_suspected,
    describe_headers,
    differs,
    most_common_kind,
)
from convmae.data.loader import Batch, make_batch, run_batches
from convmae.data.picture import NO_LABEL, Pixels
from convmae.data.shards import (
    ARCHIVE_ERRORS,
    LABEL,
    PICTURES,
    Shards,
    error_reason,
    is_address,
    list_shards,
    open_shard,
    read_samples,
)
from convmae.data.source import Source
from convmae.data.stored import Kind
from convmae.data.transforms import CentreTransform
from convmae.seeds import Stream, derive_seed, generator_for, seeded

if TYPE_CHECKING:
    import tarfile
    from collections.abc import Callable, Iterator
    from collections.abc import Set as AbstractSet

    from convmae.config.data import ReadOptions
    from convmae.data.crops import Size
    from convmae.data.decode import Header
    from convmae.data.source import ReadPlan
    from convmae.data.transforms import Transform

BUFFER = 1000  # samples, not decoded, that one loading process shuffles
MAX_TRIES = 1000  # unreadable samples in a row


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
    classes: list[str] | None
    labelled: bool
    reading: ReadOptions


def decode_sample(raw: RawSample, reading: ReadOptions) -> tuple[EncodedPicture, str | None]:
    """The picture of a sample, and its label as text.

    Raises:
        UnreadableError: there is none.
    """
    if raw.content is None:
        raise UnreadableError(raw.reason)
    suffix = next(suffix for suffix in raw.content if suffix in PICTURES)
    data = raw.content[suffix]
    text = raw.content.get(LABEL)
    label = None if text is None else text.decode("ascii", "replace").strip()
    return EncodedPicture(data, reading), label


def _check_alike(kind: Kind, wanted: SampleKind) -> None:
    """Raises `UnreadableError` where a picture is not like those of the data set."""
    if kind != (wanted.channels, wanted.dtype):
        raise UnreadableError(differs(kind, Kind(wanted.channels, wanted.dtype)))


class ReadableSample(NamedTuple):
    """A sample that has been read while looking at the first ones."""

    name: str
    picture: Pixels
    header: Header
    label: str | None


def class_number(text: str | None, kind: SampleKind) -> int:
    """The number of a label, -1 in a source that has none.

    Raises:
        UnreadableError: it is missing, or no whole number of a class.
    """
    if not kind.labelled:
        return NO_LABEL
    if text is None:
        raise UnreadableError(f"it has no .{LABEL}, as others have")
    if not text.isdecimal():
        raise UnreadableError(f"its .{LABEL} is {text[:32]!r}; expected a whole number")
    if kind.classes is not None and int(text) >= len(kind.classes):
        raise UnreadableError(f"its .{LABEL} is {text}, but there are {len(kind.classes)} classes")
    return int(text)


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
                content = _contents(archive, sample) if index in wanted else None
                yield RawSample(epoch, offset + index, label, content)
                done = index + 1
            if stop == size and done == stop and next(samples, None) is not None:
                raise DataError(
                    f"{name} holds more than {size} samples, which sizes.json or its headers say"
                )
    except DataError:
        raise
    except ARCHIVE_ERRORS as error:
        reason = error_reason(error)
    for index in range(done, stop):
        yield RawSample(epoch, offset + index, f"{name}: sample {index}", None, reason)


def _contents(archive: tarfile.TarFile, sample: dict[str, Any]) -> dict[str, bytes]:
    return {
        suffix: value if isinstance(value, bytes) else archive.extractfile(value).read()  # type: ignore[union-attr]
        for suffix, value in sample.items()
        if suffix in PICTURES or suffix == LABEL
    }


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


class StreamDataset(IterableDataset[Batch]):
    """Whole batches of one process, each prepared by the loading process whose turn it is.

    Args:
        shards: where the samples are.
        kind: what they have in common.
        transform: what is made of a picture.
        plan: which batches.
        training: shuffles, and replaces what cannot be read; else everything comes once, in order,
            with zeros and the label -1 for what cannot be read and after the end.
    """

    def __init__(
        self, shards: Shards, kind: SampleKind, transform: Transform, plan: ReadPlan, training: bool
    ) -> None:
        self.shards, self.kind, self.transform = shards, kind, transform
        self.plan, self.training = plan, training

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        plan = self.plan
        own_batches = range(plan.first + worker, plan.last, workers)
        if not own_batches:
            return
        raw_samples = _Lookahead(self._stream(own_batches[0], workers))
        for _ in own_batches:
            began = time.perf_counter()
            batch = list(islice(raw_samples, plan.batch_size))
            make = self._train_batch if self.training else self._evaluation_batch
            yield make(batch, raw_samples, began)

    def _stream(self, number: int, workers: int) -> Iterator[RawSample]:
        """The samples that this loading process reads, from batch `number` on, without end."""
        epoch, reader = number // self.plan.batches_per_epoch, number % workers
        skip = self._turns(epoch, reader, workers).index(number)
        while True:
            yield from self._epoch(epoch, reader, workers, skip * self.plan.batch_size)
            epoch, skip = epoch + 1, 0

    def _turns(self, epoch: int, reader: int, workers: int) -> range:
        """The batches `b` of an epoch that process `reader` prepares: `b % workers == reader`."""
        start = epoch * self.plan.batches_per_epoch
        shift = (reader - start) % workers
        return range(start + shift, start + self.plan.batches_per_epoch, workers)

    def _epoch(self, epoch: int, reader: int, workers: int, skip: int) -> Iterator[RawSample]:
        """The samples of one epoch in this loading process, without the first `skip`."""
        plan = self.plan
        turns = [len(self._turns(epoch, other, workers)) for other in range(workers)]
        before = plan.rank * plan.batches_per_epoch + sum(turns[:reader])
        low, count = before * plan.batch_size, turns[reader] * plan.batch_size
        if not self.training:
            order = _all_shards(self.shards)
            return read_in_order(self.shards, order, epoch, low, count, frozenset())

        from webdataset.filters import _shuffle as shuffle

        seed = derive_seed(plan.seed, Stream.BUFFER, epoch, plan.rank * workers + reader)
        places = shuffle(iter(range(count)), BUFFER, rng=random.Random(seed))
        skipped = set(islice(places, skip))
        raw_samples = read_in_order(self.shards, self._order(epoch), epoch, low, count, skipped)
        return islice(shuffle(raw_samples, BUFFER, rng=random.Random(seed)), skip, None)

    def _order(self, epoch: int) -> list[int]:
        """The shards of an epoch of training, by number."""
        generator = generator_for(self.plan.seed, Stream.ORDER, epoch)
        return torch.randperm(len(self.shards.names), generator=generator).tolist()

    def _transformed(self, raw: RawSample, epoch: int, sample: int) -> tuple[Tensor, int]:
        """The image and label of `raw` with the random numbers of `(epoch, sample)`.

        Raises:
            UnreadableError: it cannot be decoded, or is not like the others.
        """
        picture, text = decode_sample(raw, self.kind.reading)
        label = class_number(text, self.kind)
        with seeded(derive_seed(self.plan.seed, Stream.SAMPLE, epoch, sample)):
            image = self.transform(picture)
        _check_alike(Kind(len(image), image.dtype), self.kind)
        return image, label

    def _train_batch(self, batch: list[RawSample], raw_samples: _Lookahead, began: float) -> Batch:
        failures: list[Failure] = []
        samples = []
        for place, raw in enumerate(batch):
            candidates = [raw, *batch[place + 1 :]]
            samples.append(self._readable(raw, candidates, raw_samples, failures))
        keys = [(raw.epoch, raw.sample) for raw in batch]
        return make_batch(samples, keys, failures, began)

    def _readable(
        self,
        raw: RawSample,
        candidates: list[RawSample],
        raw_samples: _Lookahead,
        failures: list[Failure],
    ) -> tuple[Tensor, int]:
        """`raw`, or the next in this loading process that can be read.

        Raises:
            DataError: none of the next `MAX_TRIES` can be read.
        """
        tried: list[Failure] = []
        for step in range(MAX_TRIES):
            ahead = step - len(candidates)
            candidate = candidates[step] if ahead < 0 else raw_samples.peek(ahead)
            try:
                sample = self._transformed(candidate, raw.epoch, raw.sample)
            except UnreadableError as error:
                tried.append(Failure(candidate.name, str(error)))
                continue
            failures += tried
            return sample
        name, reason = tried[0]
        raise DataError(f"{MAX_TRIES} samples in a row cannot be read; the first, {name}: {reason}")

    def _evaluation_batch(
        self, batch: list[RawSample], raw_samples: _Lookahead, began: float
    ) -> Batch:
        blank = torch.zeros(self.kind.channels, *self.transform.size, dtype=self.kind.dtype)
        samples, failures = [], []
        for raw in batch:
            sample: tuple[Tensor, int] = (blank, NO_LABEL)
            if raw.name:
                try:
                    sample = self._transformed(raw, 0, raw.sample)
                except UnreadableError as error:
                    failures.append(Failure(raw.name, str(error)))
            samples.append(sample)
        return make_batch(samples, [(0, raw.sample) for raw in batch], failures, began)


class _Lookahead:
    """An iterator that can look ahead."""

    def __init__(self, items: Iterator[RawSample]) -> None:
        self.items, self.seen = items, deque[RawSample]()

    def __iter__(self) -> _Lookahead:
        return self

    def __next__(self) -> RawSample:
        return self.seen.popleft() if self.seen else next(self.items)

    def peek(self, ahead: int) -> RawSample:
        """The item that `ahead` others come before."""
        while len(self.seen) <= ahead:
            self.seen.append(next(self.items))
        return self.seen[ahead]


class _MapDataset(IterableDataset[Any]):
    """`function` of the first `limit` whole pictures, shared among the loading processes."""

    def __init__(
        self,
        shards: Shards,
        function: Callable[[Tensor], Any],
        limit: int,
        kind: SampleKind,
        measured: bool,
    ) -> None:
        self.shards, self.function, self.limit = shards, function, limit
        self.kind, self.measured = kind, measured

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        share = -(-self.limit // workers)
        low = worker * share
        count = max(0, min(share, self.limit - low))
        for raw in read_in_order(self.shards, _all_shards(self.shards), 0, low, count, frozenset()):
            yield raw.sample, self._result(raw)

    def _result(self, raw: RawSample) -> Any:
        try:
            picture = decode_sample(raw, self.kind.reading)[0]
            _check_alike(picture.header().kind, self.kind)
            return self.function(picture.measured() if self.measured else picture.load())
        except UnreadableError as error:
            return Failure(raw.name, str(error))


def _all_shards(shards: Shards) -> list[int]:
    return list(range(len(shards.names)))


class ShardSource(Source):
    """Samples of shards, read as a stream.

    Args:
        shards: where they are, and how many.
        max_unreadable: the share of damaged shards above which they are refused.
        workers: loading processes by default.
        reading: how their pictures are read.

    Raises:
        DataError: too many shards are damaged, there is no sample, or none can be read.
    """

    def __init__(
        self, shards: Shards, max_unreadable: float, workers: int, reading: ReadOptions
    ) -> None:
        check_share(shards.failures, len(shards.names), max_unreadable, "shards")
        self.shards, self.failures = shards, list(shards.failures)
        self.pictures = self.samples_per_epoch = sum(shards.sizes)
        self.classes, self.workers, self.max_unreadable = shards.classes, workers, max_unreadable
        self._previews: dict[tuple[int, Size], Tensor] = {}
        self.reading = reading
        first = list(islice(self._readable(), max(1, min(LOOKED_AT, *shards.sizes[:1]))))
        headers = [sample.header for sample in first]
        self.channels, self.dtype = kind = most_common_kind(headers)
        labelled = first[0].label is not None
        self.kind = SampleKind(self.channels, self.dtype, self.classes, labelled, reading)
        if reading.nodata is None:
            for sample in first:
                check_suspected(sample.picture.load(), sample.name, shards.where)
        text = f"{self.pictures} samples in {len(shards.names)} shards of {shards.where}"
        text += f", {kind.words}" if kind != PHOTO else ""
        text += f", {len(self.classes)} classes" if self.classes else ""
        notes = describe_headers([header for header in headers if header.kind == kind], reading)
        self.description = "; ".join([text, *notes])

    def _readable(self) -> Iterator[ReadableSample]:
        """The first samples that can be read, of the first `MAX_TRIES`, and their labels.

        Raises:
            DataError: there is none.
        """
        limit = min(self.pictures, MAX_TRIES)
        tried: list[Failure] = []
        for raw in read_in_order(self.shards, _all_shards(self.shards), 0, 0, limit, frozenset()):
            try:
                picture, text = decode_sample(raw, self.reading)
                header, whole = picture.header(), Pixels(picture.load())
            except UnreadableError as error:
                tried.append(Failure(raw.name, str(error)))
                continue
            yield ReadableSample(raw.name, whole, header, text)
        if len(tried) == limit:
            first_failure = f"; the first, {tried[0].name}: {tried[0].reason}" if tried else ""
            raise DataError(
                f"--data_path {self.shards.where!r} holds no sample that can be read{first_failure}"
            )

    def _train(self, transform: Transform, plan: ReadPlan) -> tuple[Dataset[Any], Any]:
        return StreamDataset(self.shards, self.kind, transform, plan, training=True), None

    def _evaluate(self, transform: Transform, plan: ReadPlan) -> tuple[Dataset[Any], Any]:
        return StreamDataset(self.shards, self.kind, transform, plan, training=False), None

    def preview(self, count: int, size: Size) -> Tensor:
        """Centre crops of the first `count` readable samples at most, read once: `[N, C, H, W]`."""
        if (count, size) not in self._previews:
            transform = CentreTransform(size)
            alike = (s.picture for s in self._readable() if s.header.kind == self.kind[:2])
            crops = [transform(picture).contiguous() for picture in islice(alike, count)]
            self._previews[count, size] = torch.stack(crops)
        return self._previews[count, size]

    def map(
        self,
        function: Callable[[Tensor], Any],
        max_pictures: int | None = None,
        workers: int | None = None,
        measured: bool = False,
    ) -> Iterator[tuple[int, Any]]:
        """`(index, function(picture))` of every picture, or of the first `max_pictures`."""
        limit = min(self.pictures, max_pictures or self.pictures)
        dataset = _MapDataset(self.shards, function, limit, self.kind, measured)
        return run_batches(dataset, None, self._workers(workers))


def open_shards(
    where: str,
    split: str | None,
    max_unreadable: float,
    workers: int,
    reading: ReadOptions,
) -> ShardSource:
    """The shards of a folder, a pattern or an address; see `list_shards`.

    Raises:
        DataError: missing, too many of them damaged, or nothing readable in them.
    """
    # One loading process at least: it ignores Ctrl-C, and so does the program that it starts to
    # fetch a shard. Started from the main process, that program would be killed.
    return ShardSource(list_shards(where, split), max_unreadable, max(1, workers), reading)
