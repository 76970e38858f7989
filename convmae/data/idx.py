"""IDX files, the format of the MNIST family: one channel of 8 bits, and labels."""

from __future__ import annotations

import gzip
import zlib
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from convmae.data.errors import DataError
from convmae.data.picture import Pixels

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from convmae.data.crops import PickBox, Size

PREFIX = {"train": "train", "val": "t10k"}
UNSIGNED_BYTE = 8  # the code of the dtype in the third byte of the file
CLASSES_AT_LEAST = 10


def find_idx(folder: Path) -> Path | None:
    """Where the IDX files lie: in `folder`, `folder/raw` or `folder/<any>/raw`; None if nowhere."""
    for candidate in (folder, folder / "raw", *sorted(folder.glob("*/raw"))):
        if any(_find_file(candidate, "images", split) for split in PREFIX):
            return candidate
    return None


def _find_file(folder: Path, what: str, split: str) -> Path | None:
    for ending in ("", ".gz"):
        path = folder / f"{_file_name(what, split)}{ending}"
        if path.is_file():
            return path
    return None


def _file_name(what: str, split: str) -> str:
    return f"{PREFIX[split]}-{what}-idx{3 if what == 'images' else 1}-ubyte"


def read_idx(path: Path, dims: int) -> np.ndarray:
    """The array of an IDX file of unsigned bytes with `dims` axes; unpacked if it ends in `.gz`.

    Raises:
        DataError: the file cannot be unpacked, is no such IDX file, or has another length than its
            header says.
    """
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:  # BadGzipFile is an OSError
        raise DataError(f"{path} cannot be read: {error}") from error
    start = 4 + 4 * dims
    if len(data) < start or data[:4] != bytes((0, 0, UNSIGNED_BYTE, dims)):
        raise DataError(f"{path} is no IDX file of unsigned bytes with {dims} axes")
    shape = np.frombuffer(data, ">u4", dims, 4).astype(int).tolist()
    expected = start + int(np.prod(shape))
    if len(data) != expected:
        raise DataError(
            f"{path} holds {len(data)} bytes, but its header says {shape}, which are {expected}"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


class IdxPhotos:
    """Pictures and labels of one split, kept in memory.

    Args:
        folder: where the files lie.
        split: "train", or "val" for the files that begin with t10k.

    Raises:
        DataError: a file is missing or broken, or pictures and labels are not as many.
    """

    channels = 1
    dtype = torch.uint8

    def __init__(self, folder: Path, split: str) -> None:
        arrays = []
        for what, dims in (("images", 3), ("labels", 1)):
            path = _find_file(folder, what, split)
            if path is None:
                raise DataError(f"{folder} lacks {_file_name(what, split)} (or the same with .gz)")
            arrays.append(read_idx(path, dims))
        self.folder, self.split = folder, split
        self.images, self.labels = arrays
        if len(self.images) != len(self.labels) or not len(self.images):
            raise DataError(
                f"{folder} holds {len(self.images)} pictures and {len(self.labels)} labels of "
                f"{PREFIX[split]}; expected as many, and at least one"
            )

    @property
    def classes(self) -> Sequence[str]:
        """ "0", "1" ... up to the largest label, at least "9"."""
        return [str(label) for label in range(max(CLASSES_AT_LEAST, int(self.labels.max()) + 1))]

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"{self.folder / _file_name('images', self.split)}[{index}]"

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def load(self, index: int) -> Tensor:
        return torch.from_numpy(self.images[index][None].copy())

    def measured(self, index: int) -> Tensor:
        return self.load(index).float()

    def crop(self, index: int, pick: PickBox, size: Size) -> Tensor:
        return Pixels(self.load(index)).crop(pick, size)
