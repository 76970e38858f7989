"""What a source of pictures offers: batches for training and evaluation, previews, statistics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from convmae.data.classes import NumberLabels, shown_number
from convmae.data.errors import DataError, Failure, UnreadableError
from convmae.data.fingerprint import Fingerprint
from convmae.data.loader import (
    EvaluationDataset,
    EvaluationSampler,
    PictureDataset,
    RunSampler,
    run_batches,
)
from convmae.data.picture import ChosenPicture, Subset
from convmae.data.transforms import CentreTransform
from convmae.seeds import Stream, generator_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from collections.abc import Set as AbstractSet

    from torch import Tensor

    from convmae.data.crops import PickBox, Size
    from convmae.data.left_out import LeftOut
    from convmae.data.loader import Batch
    from convmae.data.picture import Photos
    from convmae.data.transforms import Transform

MAX_TRIES = 1000  # unreadable pictures in a row


@dataclass(frozen=True)
class ReadPlan:
    """Which batches of a run one process is to see."""

    batch_size: int
    first: int
    last: int
    batches_per_epoch: int
    seed: int
    rank: int
    world: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank must be in [0, {self.world}), got {self.rank}")


@dataclass(frozen=True)
class ExpectedLabels:
    """From the labels of a source to the numbers of a model's classes.

    Attributes:
        count: how many classes the model has.
        numbers: of each class of the source the model's number; None where they are the same.
    """

    count: int
    numbers: tuple[int, ...] | None = None

    def number(self, label: int, name: str) -> int:
        """The model's number of the label of the picture `name`.

        Raises:
            DataError: the model has no such class.
        """
        limit = self.count if self.numbers is None else len(self.numbers)
        if label >= limit:
            raise DataError(
                f"{name} has label {shown_number(label)}, but there are {limit} classes; expected "
                f"0 to {limit - 1}"
            )
        return label if self.numbers is None or label < 0 else self.numbers[label]


class Source(ABC):
    """Pictures of one kind, and what is known to be wrong with them.

    Attributes:
        channels, dtype: of every picture; uint8, uint16 or float32.
        classes: names of the labels, or None; "0", "1" ... where there are numbers alone.
        numbers: what is known of labels that are numbers alone.
        empty_classes: names of class folders that hold no picture.
        no_classes: why there are labels, but no classes, in words; else empty.
        pictures: how many there are.
        samples_per_epoch: how many samples of them training sees in an epoch.
        description: a line for the log.
        workers: loading processes by default.
        failures: what the check before the run found.
        max_unreadable: share of unreadable pictures that is allowed.
        left_out: what lies beside the pictures and is not read.
        notes: what else there is to tell of them.
        entries: relative names and sizes of the files, for a fingerprint; None if unknown.
    """

    channels: int
    dtype: torch.dtype
    classes: list[str] | None
    numbers: NumberLabels | None = None
    empty_classes: tuple[str, ...] = ()
    no_classes: str = ""
    pictures: int
    samples_per_epoch: int
    description: str
    workers: int
    failures: list[Failure]
    max_unreadable: float
    left_out: Sequence[LeftOut] = ()
    notes: Sequence[str] = ()
    entries: Callable[[], list[tuple[str, str]]] | None = None

    def fingerprint(self) -> Fingerprint | None:
        """Which files the data set consists of; None if that is not known."""
        return None if self.entries is None else Fingerprint.of(self.entries())

    @abstractmethod
    def _train(self, transform: Transform, plan: ReadPlan) -> tuple[Dataset[Any], Any]:
        """The dataset and sampler of `batches`."""

    @abstractmethod
    def _evaluate(self, transform: Transform, plan: ReadPlan) -> tuple[Dataset[Any], Any]:
        """The dataset and sampler of `evaluation_batches`."""

    @abstractmethod
    def expect_labels(self, expected: ExpectedLabels) -> None:
        """From now on batches have the model's numbers as labels.

        Until then they have the source's own, and -1 where a sample of shards has none; from then
        on such a sample cannot be read.
        """

    @abstractmethod
    def crops(self, count: int, size: Size) -> tuple[Tensor, list[Failure]]:
        """Centre crops of `count` different pictures at most, `[N, C, H, W]`, as stored.

        One that cannot be read is replaced by another, if there are more.

        Returns:
            The crops, and what could not be read on the way.

        Raises:
            DataError: none can be read.
        """

    def preview(self, count: int, size: Size) -> Tensor:
        """The crops alone."""
        return self.crops(count, size)[0]

    @abstractmethod
    def map(
        self,
        function: Callable[[Tensor], Any],
        max_pictures: int | None = None,
        workers: int | None = None,
        measured: bool = False,
    ) -> Iterator[tuple[int, Any]]:
        """`(index, function(picture))` of every picture `[C, h, w]` as stored, in any order.

        Args:
            function: picklable.
            max_pictures: of more pictures, this many.
            workers: loading processes; the source's default if None.
            measured: pictures in float32, with NaN where there are no data.

        Yields:
            Instead of a result a `Failure`, where the picture cannot be read.
        """

    def batches(
        self,
        transform: Transform,
        batch_size: int,
        first: int,
        last: int,
        batches_per_epoch: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int | None = None,
        pin: bool = False,
    ) -> Iterator[Batch]:
        """Batches `first` to `last - 1` of a run, of process `rank`: the same wherever it began.

        Of pictures by index, batch `b` of all processes together covers `batch_size * world`
        samples of the epoch's permutation, of which each process takes its contiguous part. A
        picture that cannot be read is replaced by the next that can.

        Args:
            transform: what is made of a picture.
            batch_size: samples in a batch of this process.
            first, last: batches counted over the whole run.
            batches_per_epoch: at most, and by default,
                `samples_per_epoch // (batch_size * world)`; what is left over is dropped.
            seed: of order and transforms.
            rank, world: which process this is, of how many.
            workers: loading processes; the source's default if None.
            pin: page-locked batches.

        Raises:
            DataError: fewer samples than one batch of all processes, pictures that the transform
                cannot take, or nothing that can be read.
            ValueError: more `batches_per_epoch` than the samples make.
        """
        transform.check(self.channels, self.dtype)
        whole_batches = self.samples_per_epoch // (batch_size * world)
        if whole_batches == 0:
            raise DataError(
                f"--batch_size {batch_size} in {world} processes needs {batch_size * world} "
                f"pictures a step, but there are {self.samples_per_epoch}"
            )
        if batches_per_epoch is not None and not 0 < batches_per_epoch <= whole_batches:
            raise ValueError(
                f"batches_per_epoch must be in [1, {whole_batches}], got {batches_per_epoch}"
            )
        per_epoch = batches_per_epoch or whole_batches
        plan = ReadPlan(batch_size, first, last, per_epoch, seed, rank, world)
        dataset, sampler = self._train(transform, plan)
        return run_batches(dataset, sampler, self._workers(workers), pin)

    def evaluation_batches(
        self,
        transform: Transform,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        workers: int | None = None,
        pin: bool = False,
    ) -> Iterator[Batch]:
        """Every picture once over all processes, each of which gets the same number of batches.

        Fillers make the last batches whole: zeros, label -1, and a sample number in `keys` that is
        not below `pictures`. A picture that cannot be read is zeros with label -1 too, under its
        own number, and reported. Random numbers of a transform depend on the picture alone.

        Args:
            transform: what is made of a picture.
            batch_size: samples in a batch of this process.
            rank, world: which process this is, of how many.
            workers: loading processes; the source's default if None.
            pin: page-locked batches.

        Raises:
            DataError: pictures that the transform cannot take.
        """
        transform.check(self.channels, self.dtype)
        count = self.evaluation_steps(batch_size, world)
        plan = ReadPlan(batch_size, 0, count, count, 0, rank, world)
        dataset, sampler = self._evaluate(transform, plan)
        return run_batches(dataset, sampler, self._workers(workers), pin)

    def evaluation_steps(self, batch_size: int, world: int = 1) -> int:
        """How many batches `evaluation_batches` has: `ceil(pictures / (batch_size * world))`."""
        return -(-self.pictures // (batch_size * world))

    def _workers(self, workers: int | None) -> int:
        return self.workers if workers is None else workers


class PhotoSource(Source):
    """Pictures by index.

    Args:
        photos: the pictures.
        classes: names of the labels.
        repeats: how often an epoch of training sees each picture.
        description, workers, failures, max_unreadable, numbers, left_out: see `Source`.
        root: what the names of the pictures begin with, and need not in a table.
    """

    def __init__(
        self,
        photos: Photos,
        classes: list[str] | None = None,
        repeats: int = 1,
        description: str = "",
        workers: int = 0,
        failures: Sequence[Failure] = (),
        max_unreadable: float = 0.1,
        numbers: NumberLabels | None = None,
        left_out: Sequence[LeftOut] = (),
        root: str = "",
    ) -> None:
        self.photos, self.classes, self.description = photos, classes, description
        self.numbers = numbers
        self.expected: ExpectedLabels | None = None
        self.channels, self.dtype = photos.channels, photos.dtype
        self.pictures, self.samples_per_epoch = len(photos), repeats * len(photos)
        self.workers, self.failures = workers, list(failures)
        self.max_unreadable, self.left_out, self.root = max_unreadable, left_out, root

    def _train(self, transform: Transform, plan: ReadPlan) -> tuple[Dataset[Any], Any]:
        sampler = RunSampler(
            self.samples_per_epoch,
            plan.batch_size,
            plan.batches_per_epoch,
            plan.first,
            plan.last,
            plan.seed,
            plan.rank,
            plan.world,
        )
        return PictureDataset(self._labelled(), transform, plan.seed), sampler

    def _evaluate(self, transform: Transform, plan: ReadPlan) -> tuple[Dataset[Any], Any]:
        sampler = EvaluationSampler(self.pictures, plan.batch_size, plan.rank, plan.world)
        return EvaluationDataset(self._labelled(), transform), sampler

    def expect_labels(self, expected: ExpectedLabels) -> None:
        self.expected = expected

    def _labelled(self) -> Photos:
        """The pictures, with the labels that are expected."""
        return self.photos if self.expected is None else Relabelled(self.photos, self.expected)

    def crops(self, count: int, size: Size) -> tuple[Tensor, list[Failure]]:
        """Centre crops of `count` different pictures at most, evenly spaced; see `Source`."""
        transform, images = CentreTransform(size), []
        failures: list[Failure] = []
        chosen = evenly_spaced(self.pictures, count)
        waiting, taken = deque(chosen), frozenset(chosen)
        others = (index for index in range(self.pictures) if index not in taken)
        while waiting and len(failures) < MAX_TRIES:
            index = waiting.popleft()
            try:
                images.append(transform(ChosenPicture(self.photos, index)).contiguous())
            except UnreadableError as error:
                failures.append(Failure(self.photos.name(index), str(error)))
                waiting.extendleft(islice(others, 1))
        if not images:
            name, reason = failures[0]
            raise DataError(
                f"no picture can be read; the first of {len(failures)}, {name}: {reason}"
            )
        return torch.stack(images), failures

    def map(
        self,
        function: Callable[[Tensor], Any],
        max_pictures: int | None = None,
        workers: int | None = None,
        measured: bool = False,
    ) -> Iterator[tuple[int, Any]]:
        """`(index, function(picture))` of every picture, or of an even sample of `max_pictures`."""
        chosen = evenly_spaced(self.pictures, max_pictures or self.pictures)
        lists = [chosen[start : start + 16] for start in range(0, len(chosen), 16)]
        dataset = _MapDataset(self.photos, function, measured)
        for results in run_batches(dataset, lists, self._workers(workers)):
            yield from results


class Relabelled:
    """`photos` with the numbers of a model's classes as labels."""

    def __init__(self, photos: Photos, expected: ExpectedLabels) -> None:
        self.photos, self.expected = photos, expected
        self.channels, self.dtype = photos.channels, photos.dtype

    def __len__(self) -> int:
        return len(self.photos)

    def name(self, index: int) -> str:
        return self.photos.name(index)

    def label(self, index: int) -> int:
        return self.expected.number(self.photos.label(index), self.photos.name(index))

    def load(self, index: int) -> Tensor:
        return self.photos.load(index)

    def measured(self, index: int) -> Tensor:
        return self.photos.measured(index)

    def crop(self, index: int, pick: PickBox, size: Size) -> Tensor:
        return self.photos.crop(index, pick, size)


class _MapDataset(Dataset[Any]):
    """`function` of whole pictures."""

    def __init__(self, photos: Photos, function: Callable[[Tensor], Any], measured: bool) -> None:
        self.photos, self.function, self.measured = photos, function, measured

    def __getitems__(self, indices: list[int]) -> list[tuple[int, Any]]:
        return [(index, self._result(index)) for index in indices]

    def _result(self, index: int) -> Any:
        try:
            load = self.photos.measured if self.measured else self.photos.load
            return self.function(load(index))
        except UnreadableError as error:
            return Failure(self.photos.name(index), str(error))


def evenly_spaced(total: int, count: int) -> list[int]:
    """`count` of the numbers below `total`, evenly spaced; all of them if there are no more."""
    count = min(count, total)
    return [index * total // count for index in range(count)]


def choose_balanced(
    photos: Photos, count: int, seed: int, broken: AbstractSet[str] = frozenset(), classes: int = 1
) -> Subset:
    """`count` pictures that are not `broken`, chosen by `seed` evenly over the labels.

    Raises:
        DataError: `count` is below 1 or above the number of pictures.
    """
    generator = generator_for(seed, Stream.CHOICE)
    seen: dict[int, int] = {}
    # For each picture: its number within its class, a random number of the class, its index.
    ranked: list[tuple[int, float, int]] = []
    ties = torch.rand(max(1, classes) + 1, generator=generator).tolist()
    for index in torch.randperm(len(photos), generator=generator).tolist():
        if not broken or photos.name(index) not in broken:
            label = photos.label(index)
            rank = seen[label] = seen.get(label, -1) + 1
            ranked.append((rank, ties[label], index))
    if not 1 <= count <= len(ranked):
        raise DataError(
            f"--max_samples must be in [1, {len(ranked)}], the number of readable pictures, got "
            f"{count}"
        )
    return Subset(photos, sorted(index for _, _, index in sorted(ranked)[:count]))
