"""Where a run's pictures come from: the demo or a folder, checked before the first step."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from convmae.data import CropDataset, DataError, DemoPhotos, FolderPhotos
from convmae.data.crops import Failure, centre_box, read_or_next
from convmae.data.demo import CROPS_PER_PHOTO
from convmae.data.folder import check_readable, find_pictures

if TYPE_CHECKING:
    from torch import Tensor

    from convmae.data.crops import Photos
    from convmae.training.config import PretrainConfig
    from convmae.training.log import RunLog

NAMED_AT_MOST = 20  # unreadable pictures named on the terminal; the log names all


@dataclass
class Source:
    """Pictures, how many crops of them make an epoch, and what is known to be wrong with them."""

    photos: Photos
    samples_per_epoch: int
    description: str
    workers: int
    failures: list[Failure] = field(default_factory=list)

    def dataset(self, config: PretrainConfig) -> CropDataset:
        """The random-resized-crops that `config` asks for."""
        return CropDataset(
            self.photos,
            config.size,
            config.seed,
            self.samples_per_epoch,
            config.min_crop,
            config.hflip,
        )


def open_source(data_path: str, max_unreadable: float) -> Source:
    """`demo` or a folder of pictures, its headers checked.

    A folder with a `train` folder inside is read from there, as the official code does.

    Raises:
        DataError: no such folder, no picture in it, or more than the share `max_unreadable` of
            those checked is unreadable.
    """
    if data_path == "demo":
        photos = DemoPhotos()
        samples = len(photos) * CROPS_PER_PHOTO
        words = f"{len(photos)} photographs of scikit-image, {samples} crops of them an epoch"
        return Source(photos, samples, f"demo: {words}", workers=0)
    folder = Path(data_path).expanduser()
    if (folder / "train").is_dir():
        folder = folder / "train"
    paths = find_pictures(folder)
    failures, checked = check_readable(paths)
    check_share(len(failures), checked, max_unreadable, paths, failures)
    workers = min(8, _cores() - 1)
    return Source(
        FolderPhotos(paths), len(paths), f"{len(paths)} pictures in {folder}", workers, failures
    )


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_share(
    count: int, of: int, limit: float, paths: list[Path], failures: list[Failure]
) -> None:
    """Raises `DataError` where more than the share `limit` of the pictures is unreadable."""
    if count <= limit * of and count < of:
        return
    first = "; ".join(f"{paths[index]}: {reason}" for index, reason in failures[:5])
    raise DataError(
        f"{count} of {of} pictures cannot be read ({count / of:.1%}), more than --max_unreadable "
        f"{limit:g} allows. The first: {first}"
    )


class UnreadableTally:
    """Counts and names the pictures that cannot be read, and stops a run that has too many."""

    def __init__(self, source: Source, limit: float) -> None:
        self.source, self.limit = source, limit
        self.reasons: dict[int, str] = {}
        self._told = 0

    def report(self, log: RunLog, step: int) -> None:
        """Tells what the check before the run found."""
        self.add(self.source.failures, log, step)

    def add(self, failures: list[Failure], log: RunLog, step: int) -> None:
        """Notes failures; each picture is told once.

        Raises:
            DataError: there are more than the share `limit` of all pictures now.
        """
        new = [(index, reason) for index, reason in failures if index not in self.reasons]
        for index, reason in new:
            if index in self.reasons:
                continue
            self.reasons[index] = reason
            name = self.source.photos.name(index)
            log.write({"event": "unreadable", "step": step, "path": name, "reason": reason})
            self._told += 1
            if self._told <= NAMED_AT_MOST:
                log.say(f"warning: skipped unreadable picture {name}: {reason}")
            if self._told == NAMED_AT_MOST:
                log.say("warning: further unreadable pictures are named in log.txt only")
        if new and isinstance(self.source.photos, FolderPhotos):
            paths = self.source.photos.paths
            known = list(self.reasons.items())
            check_share(len(known), len(paths), self.limit, paths, known)

    def named(self) -> dict[str, str]:
        """Path and reason of every unreadable picture."""
        return {self.source.photos.name(i): reason for i, reason in self.reasons.items()}


def preview(source: Source, count: int, size: tuple[int, int]) -> Tensor:
    """Centre crops of `count` pictures at most, evenly chosen: uint8 `[N, 3, H, W]`."""
    total = len(source.photos)
    count = min(count, total)
    chosen = (index * total // count for index in range(count))
    crops = [read_or_next(source.photos, index, centre_box(size), size)[0] for index in chosen]
    return torch.stack([crop.contiguous() for crop in crops])
