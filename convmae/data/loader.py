"""Batches of a whole run, from any step on: what a run sees does not depend on where it began."""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from convmae.config import MessageError
from convmae.data.errors import DataError, Failure, UnreadableError
from convmae.data.picture import NO_LABEL, ChosenPicture
from convmae.seeds import Stream, derive_seed, generator_for, seeded

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from convmae.data.picture import Photos
    from convmae.data.transforms import Transform


class Batch(NamedTuple):
    """What one step of one process sees."""

    images: Tensor
    """uint8, uint16 or float32 `[N, C, H, W]`, as stored (not normalised)."""
    labels: Tensor
    """int64 `[N]`; -1 where there is none."""
    keys: Tensor
    """int64 `[N, 2]`, the epoch and the sample: what random numbers for a picture derive from."""
    failures: list[Failure]
    """The pictures that could not be read on the way."""
    seconds: float
    """What preparing this batch took in the process that did it."""


Sample = tuple[Tensor, int]  # image, label
SampleKey = tuple[int, int]  # epoch, sample


def make_batch(
    samples: list[Sample], keys: list[SampleKey], failures: list[Failure], began: float
) -> Batch:
    """Stacks samples; `began` is `time.perf_counter()` at the start of the work."""
    images = torch.stack([image.contiguous() for image, _ in samples])
    labels = torch.tensor([label for _, label in samples], dtype=torch.int64)
    key_tensor = torch.tensor(keys, dtype=torch.int64)
    return Batch(images, labels, key_tensor, failures, time.perf_counter() - began)


class RunSampler(Sampler[list[SampleKey]]):
    """The batches of steps `first` to `last - 1` of a run, as lists of `(epoch, sample)`.

    Every epoch is a fresh permutation from `(seed, epoch)`, cut into `batches_per_epoch` whole
    batches of `batch_size * world` (what is left over is dropped), of which process `rank` takes
    its contiguous part.

    Args:
        num_samples: samples in an epoch.
        batch_size: samples in a batch of one process.
        batches_per_epoch: at most `num_samples // (batch_size * world)`.
        first, last: batches counted over the whole run.
        seed: of the permutations.
        rank, world: which process this is, of how many.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        batches_per_epoch: int,
        first: int,
        last: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.num_samples, self.batch_size = num_samples, batch_size
        self.batches_per_epoch = batches_per_epoch
        self.first, self.last, self.seed = first, last, seed
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return max(0, self.last - self.first)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        order: list[int] = []
        ordered_epoch = -1
        for step in range(self.first, self.last):
            epoch, position = divmod(step, self.batches_per_epoch)
            if epoch != ordered_epoch:
                generator = generator_for(self.seed, Stream.ORDER, epoch)
                order = torch.randperm(self.num_samples, generator=generator).tolist()
                ordered_epoch = epoch
            start = (position * self.world + self.rank) * self.batch_size
            yield [(epoch, sample) for sample in order[start : start + self.batch_size]]


class EvaluationSampler(Sampler[list[SampleKey]]):
    """Every sample once over all processes, as lists of `(0, sample)`, in order.

    All processes get the same number of whole batches: where the samples end, numbers from
    `num_samples` on stand for fillers.

    Args:
        num_samples: samples in all.
        batch_size: samples in a batch of one process.
        rank, world: which process this is, of how many.
    """

    def __init__(self, num_samples: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.num_samples, self.batch_size = num_samples, batch_size
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return -(-self.num_samples // (self.batch_size * self.world))

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for number in range(len(self)):
            start = (number * self.world + self.rank) * self.batch_size
            yield [(0, start + place) for place in range(self.batch_size)]


class PictureDataset(Dataset[Sample]):
    """`transform` of sample `i` of epoch `e`: random numbers depend on `(seed, e, i)` alone.

    Sample `i` comes from picture `i % len(photos)`. A picture that cannot be read is replaced,
    label and all, by the next one that can (the same in every run), and reported.

    Args:
        photos: where the pictures come from.
        transform: what is made of a picture.
        seed: with the epoch and the sample, all that randomness depends on.
    """

    def __init__(self, photos: Photos, transform: Transform, seed: int = 0) -> None:
        self.photos, self.transform, self.seed = photos, transform, seed

    def sample(self, epoch: int, sample: int) -> tuple[Sample, list[Failure]]:
        """`(image, label)`, and the pictures that could not be read on the way.

        Raises:
            DataError: no picture at all could be read.
        """
        with seeded(derive_seed(self.seed, Stream.SAMPLE, epoch, sample)):
            return read_or_next(self.photos, sample, self.transform)

    def __getitems__(self, keys: list[SampleKey]) -> Batch:
        began = time.perf_counter()
        done = [self.sample(*key) for key in keys]
        failures = [failure for _, sample_failures in done for failure in sample_failures]
        return make_batch([sample for sample, _ in done], keys, failures, began)


class EvaluationDataset(PictureDataset):
    """Each picture once: one that cannot be read is a filler (zeros, label -1), and reported."""

    def __getitems__(self, keys: list[SampleKey]) -> Batch:
        began = time.perf_counter()
        samples, failures = [], []
        blank = torch.zeros(self.photos.channels, *self.transform.size, dtype=self.photos.dtype)
        for _, index in keys:
            sample: Sample = (blank, NO_LABEL)
            if index < len(self.photos):
                try:
                    with seeded(derive_seed(self.seed, Stream.EVALUATION, index)):
                        image = self.transform(ChosenPicture(self.photos, index))
                    sample = (image, self.photos.label(index))
                except UnreadableError as error:
                    failures.append(Failure(self.photos.name(index), str(error)))
            samples.append(sample)
        return make_batch(samples, keys, failures, began)


def read_or_next(photos: Photos, index: int, transform: Transform) -> tuple[Sample, list[Failure]]:
    """Picture `index % len(photos)` or the next that can be read, and its label; what failed.

    Raises:
        DataError: not one of the pictures can be read.
    """
    failures: list[Failure] = []
    for step in range(len(photos)):
        candidate = (index + step) % len(photos)
        try:
            image = transform(ChosenPicture(photos, candidate))
            return (image, photos.label(candidate)), failures
        except UnreadableError as error:
            failures.append(Failure(photos.name(candidate), str(error)))
    name, reason = failures[0] if failures else ("none", "")
    raise DataError(f"none of the {len(photos)} pictures can be read; the first, {name}: {reason}")


def run_batches(
    dataset: Dataset[Any],
    sampler: Iterable[list[Any]] | None,
    workers: int = 0,
    pin: bool = False,
) -> Iterator[Any]:
    """What `dataset.__getitems__` makes of each list of `sampler`, or what `dataset` yields.

    The loading processes live until the iterator ends or is deleted.

    Args:
        dataset: by index, or iterable where `sampler` is None.
        sampler: lists of indices.
        workers: loading processes; 0 loads in this one.
        pin: copies tensors to page-locked memory.

    Raises:
        DataError: from the dataset, without the traceback of another process.
    """
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=1 if sampler is not None else None,
        batch_sampler=sampler,  # type: ignore[arg-type]
        num_workers=workers,
        pin_memory=pin,
        collate_fn=_unchanged,
        worker_init_fn=_begin_worker,
    )
    reason = ""
    try:
        yield from loader
        return
    except Exception as error:
        # A frame of torch in the traceback refers to the error, which refers to the traceback: the
        # loading processes would live on.
        traceback.clear_frames(error.__traceback__)
        if not isinstance(error, DataError):
            raise
        text = error.with_flags if isinstance(error, MessageError) else str(error)
        reason = text.rpartition("DataError: ")[2].strip()
    raise DataError(reason)


def _unchanged(value: Any) -> Any:
    """No collation: the dataset makes whole batches."""
    return value


def _begin_worker(worker: int) -> None:
    MessageError.keep_flags = True  # PyTorch hands over the text of an error
    _ignore_signals()


def _ignore_signals() -> None:
    """Leaves signals, which reach the whole process group, to the main process.

    SIGTERM from the main process itself is obeyed: Python sends it when it exits, and waits.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS has none
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()


def _exit_with_parent(parent: int) -> None:
    """Exits on SIGTERM from the parent alone; a signal handler could not see who sent it."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
