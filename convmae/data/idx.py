"""IDX files, the format of the MNIST family: one channel of 8 bits, and labels."""

from __future__ import annotations

import gzip
import math
import zlib
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from torch import Tensor

from convmae.data.classes import NumberLabels
from convmae.data.errors import DataError
from convmae.data.picture import NO_LABEL, Pixels

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from convmae.data.crops import PickBox, Size

PREFIX = {"train": "train", "val": "t10k"}
UNSIGNED_BYTE = 8  # the code of the dtype in the third byte of the file
CLASSES_AT_LEAST = 10
GZIP_AT_MOST = 1032  # times as large as it is, no file of gzip unpacks to more
PIECE = 2**22  # bytes unpacked at a time
UNPACKED_AT_MOST = 2**32  # bytes of a packed file, which go to memory


def find_idx(folder: Path) -> Path | None:
    """Where the IDX files lie: in `folder`, `folder/raw` or `folder/<any>/raw`; None if nowhere."""
    for candidate in (folder, folder / "raw", *sorted(folder.glob("*/raw"))):
        if any(_find_file(candidate, "images", split) for split in PREFIX):
            return candidate
    return None


def only_split(folder: Path) -> str:
    """The split whose pictures are in `folder`.

    Raises:
        DataError: those of both are.
    """
    there = [split for split in PREFIX if _find_file(folder, "images", split)]
    if len(there) > 1:
        raise DataError(
            f"--data_path: {folder} holds the splits train and val ({' and '.join(PREFIX.values())}"
            "); give --split"
        )
    return there[0]


def _find_file(folder: Path, what: str, split: str) -> Path | None:
    for ending in ("", ".gz"):
        path = folder / f"{_file_name(what, split)}{ending}"
        if path.is_file():
            return path
    return None


def _file_name(what: str, split: str) -> str:
    return f"{PREFIX[split]}-{what}-idx{3 if what == 'images' else 1}-ubyte"


def is_idx(name: str) -> bool:
    """Whether a file of that name is one of the family's."""
    names = {_file_name(what, split) for what in ("images", "labels") for split in PREFIX}
    return name.removesuffix(".gz") in names


def read_idx(path: Path, dims: int) -> np.ndarray:
    """The array of an IDX file of unsigned bytes with `dims` axes; unpacked if it ends in `.gz`.

    A file that is not packed is mapped into memory. Of one that is packed no more is unpacked than
    its header announces, and that at most `UNPACKED_AT_MOST`.

    Raises:
        DataError: the file cannot be unpacked, is no such IDX file, or has another length than its
            header says.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            shape, start = _read_header(path, file, dims)
            expected = start + math.prod(shape)
            if path.suffix == ".gz":
                _check_packed(path, shape, expected)
                data = _read_at_most(file, expected - start + 1)  # one more: there is more
                more = " or more" if len(data) > expected - start else ""
                size = start + len(data)
            else:
                size, more = path.stat().st_size, ""
    except (OSError, EOFError, zlib.error) as error:  # BadGzipFile is an OSError
        raise DataError(f"{path} cannot be read: {error}") from error
    if size != expected:
        raise DataError(
            f"{path} holds {size}{more} bytes, but its header says {shape}, which are {expected}"
        )
    if path.suffix == ".gz":
        return np.frombuffer(data, np.uint8).reshape(shape)
    return np.memmap(path, np.uint8, "r", start, tuple(shape))


def _read_at_most(file: BinaryIO | gzip.GzipFile, count: int) -> bytearray:
    """`file.read(count)`, which takes no memory for what is not there."""
    data = bytearray()
    while len(data) < count and (piece := file.read(min(PIECE, count - len(data)))):
        data += piece
    return data


def _read_header(path: Path, file: BinaryIO | gzip.GzipFile, dims: int) -> tuple[list[int], int]:
    """The shape that the header tells, and how many bytes the header has."""
    start = 4 + 4 * dims
    header = file.read(start)
    if len(header) < start or header[:4] != bytes((0, 0, UNSIGNED_BYTE, dims)):
        raise DataError(f"{path} is no IDX file of unsigned bytes with {dims} axes")
    shape = np.frombuffer(header, ">u4", dims, 4).astype(int).tolist()
    if 0 in shape:
        raise DataError(f"{path} is empty: its header says {shape}")
    return shape, start


def _check_packed(path: Path, shape: list[int], expected: int) -> None:
    """Raises `DataError` where a packed file announces more than it can hold, or memory should."""
    packed = path.stat().st_size
    if expected > packed * GZIP_AT_MOST:
        raise DataError(
            f"{path} holds {packed} bytes, but its header says {shape}, which are {expected}; so "
            "much cannot be packed into it"
        )
    if expected > UNPACKED_AT_MOST:
        raise DataError(
            f"{path} announces {shape}, which are {expected} bytes; expected at most "
            f"{UNPACKED_AT_MOST} in a packed file. Unpack it with gunzip: it is then not read into "
            "memory"
        )


class IdxPhotos:
    """Pictures and labels of one split, kept in memory.

    Args:
        folder: where the files lie.
        split: "train", or "val" for the files that begin with t10k.
        labelled: labels are needed; otherwise they are read if they are there.

    Raises:
        DataError: a file is missing or broken, or pictures and labels are not as many.
    """

    channels = 1
    dtype = torch.uint8

    def __init__(self, folder: Path, split: str, labelled: bool = True) -> None:
        arrays: list[np.ndarray] = []
        self.paths: list[Path] = []
        for what, dims in (("images", 3), ("labels", 1)):
            path = _find_file(folder, what, split)
            if path is None and what == "labels" and not labelled:
                break
            if path is None:
                raise DataError(f"{folder} lacks {_file_name(what, split)} (or the same with .gz)")
            arrays.append(read_idx(path, dims))
            self.paths.append(path)
        self.folder, self.split = folder, split
        self.images = arrays[0]
        self.labels: np.ndarray | None = arrays[1] if len(arrays) > 1 else None
        labels = len(self.images) if self.labels is None else len(self.labels)
        if len(self.images) != labels or not labels:
            raise DataError(
                f"{folder} holds {len(self.images)} pictures and {labels} labels of "
                f"{PREFIX[split]}; expected as many, and at least one"
            )

    def number_labels(self) -> NumberLabels | None:
        """The largest label, and where it is; None without labels."""
        if self.labels is None:
            return None
        place = int(self.labels.argmax())
        name = f"{self.folder / _file_name('labels', self.split)}[{place}]"
        return NumberLabels(int(self.labels[place]), name)

    @property
    def classes(self) -> Sequence[str]:
        """ "0", "1" ... up to the largest label, at least "9"."""
        most = -1 if self.labels is None else int(self.labels.max())
        return [str(label) for label in range(max(CLASSES_AT_LEAST, most + 1))]

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"{self.folder / _file_name('images', self.split)}[{index}]"

    def label(self, index: int) -> int:
        return NO_LABEL if self.labels is None else int(self.labels[index])

    def load(self, index: int) -> Tensor:
        return torch.from_numpy(self.images[index][None].copy())

    def measured(self, index: int) -> Tensor:
        return self.load(index).float()

    def crop(self, index: int, pick: PickBox, size: Size) -> Tensor:
        return Pixels(self.load(index)).crop(pick, size)
