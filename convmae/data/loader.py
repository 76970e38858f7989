"""Batches of a whole run, from any step on: what a run sees does not depend on where it began."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from convmae.data.crops import CropDataset, Failure, derive_seed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

ORDER_STREAM = 1  # keeps the seeds of the shuffling apart from those of the crops


class Batch(NamedTuple):
    """uint8 `images` `[N, 3, H, W]`, and the pictures that could not be read on the way."""

    images: Tensor
    failures: list[Failure]


class RunSampler(Sampler[list[tuple[int, int]]]):
    """The batches of steps `first` to `last - 1` of a run, as lists of `(epoch, sample)`.

    Every epoch is a fresh permutation from `(seed, epoch)`, cut into `batches_per_epoch` whole
    batches (what is left over is dropped).

    Args:
        num_samples: samples in an epoch.
        batch_size: samples in a batch.
        batches_per_epoch: at most `num_samples // batch_size`.
        first, last: batches counted over the whole run.
        seed: of the permutations.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        batches_per_epoch: int,
        first: int,
        last: int,
        seed: int,
    ) -> None:
        self.num_samples, self.batch_size = num_samples, batch_size
        self.batches_per_epoch = batches_per_epoch
        self.first, self.last, self.seed = first, last, seed

    def __len__(self) -> int:
        return max(0, self.last - self.first)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order: list[int] = []
        order_of = -1
        for step in range(self.first, self.last):
            epoch, position = divmod(step, self.batches_per_epoch)
            if epoch != order_of:
                generator = torch.Generator()
                generator.manual_seed(derive_seed(self.seed, ORDER_STREAM, epoch, 0))
                order = torch.randperm(self.num_samples, generator=generator).tolist()
                order_of = epoch
            start = position * self.batch_size
            yield [(epoch, sample) for sample in order[start : start + self.batch_size]]


def make_loader(
    dataset: CropDataset, sampler: RunSampler, num_workers: int = 0, pin_memory: bool = False
) -> Iterable[Batch]:
    """A DataLoader over all the steps of `sampler`: its workers live as long as the run."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=_collate,
        worker_init_fn=_ignore_interrupts,
    )


def _collate(samples: list[tuple[Tensor, list[Failure]]]) -> Batch:
    failures = [failure for _, of_sample in samples for failure in of_sample]
    return Batch(torch.stack([image.contiguous() for image, _ in samples]), failures)


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches the whole process group; only the main process is to act on it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
