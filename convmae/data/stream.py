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

from convmae.data.classes import NumberLabels, number_classes
from convmae.data.errors import DataError, Failure, UnreadableError, check_share
from convmae.data.folder import (
    LOOKED_AT,
    PHOTO,
    check_suspected,
    describe_headers,
    most_common_kind,
)
from convmae.data.formats.stored import Kind
from convmae.data.labels import NAMES_HELP, LabelReader
from convmae.data.loader import Batch, Sample, make_batch, run_batches
from convmae.data.picture import NO_LABEL, Pixels
from convmae.data.samples import (
    RawSample,
    SampleKind,
    all_shards,
    check_alike,
    chosen_samples,
    class_number,
    decode_sample,
    read_chosen,
    read_in_order,
)
from convmae.data.shards import Shards, list_shards
from convmae.data.source import MAX_TRIES, ExpectedLabels, Source
from convmae.data.transforms import CentreTransform
from convmae.seeds import Stream, derive_seed, generator_for, seeded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from convmae.config.data import ReadOptions
    from convmae.data.crops import Size
    from convmae.data.formats.decode import Header
    from convmae.data.source import ReadPlan
    from convmae.data.transforms import Transform

BUFFER = 1000  # samples, not decoded, that one loading process shuffles


class ReadableSample(NamedTuple):
    """A sample that has been read while looking at the first ones."""

    name: str
    picture: Pixels
    header: Header
    label: str | None


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

    def _transformed(self, raw: RawSample, epoch: int, sample: int) -> Sample:
        """The image and label of `raw` with the random numbers of `(epoch, sample)`.

        Raises:
            UnreadableError: it cannot be decoded, or is not like the others.
        """
        picture, text = decode_sample(raw, self.kind.reading)
        label = class_number(text, self.kind, raw.name)
        with seeded(derive_seed(self.plan.seed, Stream.SAMPLE, epoch, sample)):
            image = self.transform(picture)
        check_alike(Kind(len(image), image.dtype), self.kind)
        return Sample(image, label)

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
    ) -> Sample:
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
        image = torch.zeros(self.kind.channels, *self.transform.size, dtype=self.kind.dtype)
        filler = Sample(image, NO_LABEL)
        samples, failures = [], []
        for raw in batch:
            sample = filler
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
            check_alike(picture.header().kind, self.kind)
            return self.function(picture.measured() if self.measured else picture.load())
        except UnreadableError as error:
            return Failure(raw.name, str(error))


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
