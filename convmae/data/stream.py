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
from bisect import bisect_left
from collections import deque
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from convmae.data.archive import (
    ARCHIVE_ERRORS,
    PICTURES,
    error_reason,
    is_address,
    open_shard,
    read_member,
    read_samples,
)
from convmae.data.classes import NumberLabels, number_classes
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
from convmae.data.labels import LABEL, NAMES_HELP, LabelReader, label_text
from convmae.data.loader import Batch, make_batch, run_batches
from convmae.data.picture import NO_LABEL, Pixels
from convmae.data.shards import Shards, list_shards
from convmae.data.sizes import SIZES_FILE, SIZES_HELP
from convmae.data.source import MAX_TRIES, ExpectedLabels, Source, evenly_spaced
from convmae.data.stored import Kind
from convmae.data.transforms import CentreTransform
from convmae.seeds import Stream, derive_seed, generator_for, seeded

if TYPE_CHECKING:
    import tarfile
    from collections.abc import Callable, Iterator, Sequence
    from collections.abc import Set as AbstractSet

    from convmae.config.data import ReadOptions
    from convmae.data.crops import Size
    from convmae.data.decode import Header
    from convmae.data.source import ReadPlan
    from convmae.data.transforms import Transform

LABELS_BELOW = 2**63  # those that an int64 holds
BUFFER = 1000  # samples, not decoded, that one loading process shuffles
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
            order = all_shards(self.shards)
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
        label = class_number(text, self.kind, raw.name)
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
    """`function` of the whole pictures `numbers`, shared among the loading processes."""

    def __init__(
        self,
        shards: Shards,
        function: Callable[[Tensor], Any],
        numbers: Sequence[int],
        kind: SampleKind,
        measured: bool,
    ) -> None:
        self.shards, self.function, self.numbers = shards, function, numbers
        self.kind, self.measured = kind, measured

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        share = -(-len(self.numbers) // workers)
        for raw in read_chosen(self.shards, self.numbers[worker * share : (worker + 1) * share]):
            yield raw.sample, self._result(raw)

    def _result(self, raw: RawSample) -> Any:
        try:
            picture = decode_sample(raw, self.kind.reading)[0]
            _check_alike(picture.header().kind, self.kind)
            return self.function(picture.measured() if self.measured else picture.load())
        except UnreadableError as error:
            return Failure(raw.name, str(error))


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
        self.workers, self.max_unreadable = workers, max_unreadable
        self.left_out = [shards.left_out] if shards.left_out and shards.left_out.total else []
        self.notes, self.entries = shards.notes, shards.entries
        self._crops: dict[tuple[int, Size], tuple[Tensor, list[Failure]]] = {}
        self.reading = reading
        first = list(islice(self._readable([]), max(1, min(LOOKED_AT, *shards.sizes[:1]))))
        headers = [sample.header for sample in first]
        self.channels, self.dtype = kind = most_common_kind(headers)
        self._describe_labels(first[0].label is not None)
        named = self.classes is not None and self.numbers is None
        reader = LabelReader(None if shards.classes is None else self.classes)
        labelled = named or self.numbers is not None
        self.kind = SampleKind(self.channels, self.dtype, reading, reader if labelled else None)
        if reading.nodata is None:
            for sample in first:
                check_suspected(sample.picture.load(), sample.name, shards.where)
        text = f"{self.pictures} samples in {len(shards.names)} shards of {shards.where}"
        text += f", {kind.words}" if kind != PHOTO else ""
        text += f", {len(self.classes)} classes" if self.classes else ""
        notes = describe_headers([header for header in headers if header.kind == kind], reading)
        self.description = "; ".join([text, *notes])

    def _describe_labels(self, first_has: bool) -> None:
        """Sets `classes`, `numbers` and `no_classes`; `first_has`: the first sample has a label."""
        names, tally = self.shards.classes, self.shards.labels
        self.classes = names
        if names is not None and names == number_classes(len(names)):
            self.numbers = NumberLabels(len(names) - 1, "the last of its classes in sizes.json")
        elif tally is not None:
            self.classes, self.numbers = tally.classes(), tally.number_labels()
            self.no_classes = tally.problem() or ""
        elif names is None and first_has:
            self.numbers = NumberLabels()
            self.no_classes = f"how many there are is not known; {NAMES_HELP}, or give --nb_classes"

    def expect_labels(self, expected: ExpectedLabels) -> None:
        self.kind = self.kind._replace(expected=expected)

    def _readable(self, tried: list[Failure]) -> Iterator[ReadableSample]:
        """The first samples that can be read, of the first `MAX_TRIES`, and their labels.

        What cannot be read on the way is added to `tried`.

        Raises:
            DataError: there is none.
        """
        limit = min(self.pictures, MAX_TRIES)
        for raw in read_in_order(self.shards, all_shards(self.shards), 0, 0, limit, frozenset()):
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

    def crops(self, count: int, size: Size) -> tuple[Tensor, list[Failure]]:
        """Centre crops of the first `count` readable samples at most, read once; see `Source`."""
        if (count, size) not in self._crops:
            transform = CentreTransform(size)
            failures: list[Failure] = []
            alike = (s.picture for s in self._readable(failures) if s.header.kind == self.kind[:2])
            crops = [transform(picture).contiguous() for picture in islice(alike, count)]
            self._crops[count, size] = torch.stack(crops), failures
        return self._crops[count, size]

    def map(
        self,
        function: Callable[[Tensor], Any],
        max_pictures: int | None = None,
        workers: int | None = None,
        measured: bool = False,
    ) -> Iterator[tuple[int, Any]]:
        """`(index, function(picture))` of every picture, or of `chosen_samples`."""
        if max_pictures is None or max_pictures >= self.pictures:
            numbers: Sequence[int] = range(self.pictures)
        else:
            numbers = chosen_samples(self.shards, max_pictures)
        dataset = _MapDataset(self.shards, function, numbers, self.kind, measured)
        return run_batches(dataset, None, self._workers(workers))


def open_shards(
    where: str,
    split: str | None,
    max_unreadable: float,
    workers: int,
    reading: ReadOptions,
    undivided: bool = False,
) -> ShardSource:
    """The shards of a folder, a pattern or an address; see `list_shards`.

    Raises:
        DataError: missing, too many of them damaged, or nothing readable in them.
    """
    # One loading process at least: it ignores Ctrl-C, and so does the program that it starts to
    # fetch a shard. Started from the main process, that program would be killed.
    listed = list_shards(where, split, undivided)
    return ShardSource(listed, max_unreadable, max(1, workers), reading)
