"""What a source of pictures offers: batches for training and evaluation, previews, statistics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from convmae.data.errors import DataError, Failure, UnreadableError
from convmae.data.loader import (
    EvaluationDataset,
    EvaluationSampler,
    PictureDataset,
    RunSampler,
    read_or_next,
    run_batches,
)
from convmae.data.picture import Subset
from convmae.data.transforms import CentreTransform
from convmae.seeds import Stream, generator_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from collections.abc import Set as AbstractSet

    from torch import Tensor

    from convmae.data.crops import Size
    from convmae.data.loader import Batch
    from convmae.data.picture import Photos
    from convmae.data.transforms import Transform


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


class Source(ABC):
    """Pictures of one kind, and what is known to be wrong with them.

    Attributes:
        channels, dtype: of every picture; uint8, uint16 or float32.
        classes: names of the labels, or None.
        pictures: how many there are.
        samples_per_epoch: how many samples of them training sees in an epoch.
        description: a line for the log.
        workers: loading processes by default.
        failures: what the check before the run found.
        max_unreadable: share of unreadable pictures that is allowed.
    """

    channels: int
    dtype: torch.dtype
    classes: list[str] | None
    pictures: int
    samples_per_epoch: int
    description: str
    workers: int
    failures: list[Failure]
    max_unreadable: float

    @abstractmethod
    def _train(self, transform: Transform, plan: ReadPlan) -> tuple[Dataset[Any], Any]:
        """The dataset and sampler of `batches`."""

    @abstractmethod
    def _evaluate(self, transform: Transform, plan: ReadPlan) -> tuple[Dataset[Any], Any]:
        """The dataset and sampler of `evaluation_batches`."""

    @abstractmethod
    def preview(self, count: int, size: Size) -> Tensor:
        """Centre crops of `count` pictures at most: `[N, C, H, W]`, as stored.

        Raises:
            DataError: none can be read.
        """

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
        description, workers, failures, max_unreadable: see `Source`.
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
    ) -> None:
        self.photos, self.classes, self.description = photos, classes, description
        self.channels, self.dtype = photos.channels, photos.dtype
        self.pictures, self.samples_per_epoch = len(photos), repeats * len(photos)
        self.workers, self.failures = workers, list(failures)
        self.max_unreadable = max_unreadable

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
        return PictureDataset(self.photos, transform, plan.seed), sampler

    def _evaluate(self, transform: Transform, plan: ReadPlan) -> tuple[Dataset[Any], Any]:
        sampler = EvaluationSampler(self.pictures, plan.batch_size, plan.rank, plan.world)
        return EvaluationDataset(self.photos, transform), sampler

    def preview(self, count: int, size: Size) -> Tensor:
        """Centre crops of `count` pictures at most, evenly spaced: `[N, C, H, W]`, as stored.

        Raises:
            DataError: none can be read.
        """
        transform = CentreTransform(size)
        chosen = evenly_spaced(self.pictures, count)
        crops = [read_or_next(self.photos, index, transform)[0][0] for index in chosen]
        return torch.stack([crop.contiguous() for crop in crops])

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
