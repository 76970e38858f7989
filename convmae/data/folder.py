"""Picture files: found in nested or flat folders, checked, decoded no larger than needed."""

from __future__ import annotations

import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from torch import Tensor

from convmae.data.crops import resized_crop
from convmae.data.photos import NO_LABEL, Failure, UnreadableError
from convmae.data.picture import DataError, read_picture, upright_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from collections.abc import Set as AbstractSet

    from PIL import Image as PILImage

    from convmae.data.crops import Box, Pick, Size

JPEG = {".jpg", ".jpeg", ".jpe", ".jfif"}
NETPBM = {".ppm", ".pgm", ".pbm", ".pnm"}
EXTENSIONS = JPEG | NETPBM | {".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".tga"}
EXTENSIONS |= {".jp2", ".avif"}
CHECK_AT_MOST = 20_000  # headers read before training; of more files, an even sample


def find_pictures(
    folder: str | Path,
    option: str = "--data_path",
    extensions: AbstractSet[str] = frozenset(EXTENSIONS),
) -> list[Path]:
    """Every picture file under `folder`, at any depth, in the same order on every machine.

    Files are told by their extension (either case); names that begin with a dot are left out; links
    to folders are followed, each folder once.

    Args:
        folder: where to look.
        option: the flag to name in the error.
        extensions: in lower case, with the dot.

    Raises:
        DataError: `folder` does not exist, is not a folder, or holds no picture.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise DataError(f"{option} {str(folder)!r} {what}; expected 'demo' or a folder of pictures")
    found = list(walk_pictures(root, extensions))
    if not found:
        kinds = " ".join(sorted(extension[1:] for extension in extensions))
        raise DataError(f"{option} {str(folder)!r} holds no picture (looked for: {kinds})")
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def walk_pictures(
    root: Path, extensions: AbstractSet[str] = frozenset(EXTENSIONS)
) -> Iterator[Path]:
    """The files that `find_pictures` finds, one by one, in no order."""
    seen: set[str] = set()
    for here, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in extensions:
                yield Path(here, name)


def check_readable(
    paths: Sequence[Path], why: Callable[[Path], str | None] | None = None, threads: int = 8
) -> tuple[list[Failure], int]:
    """Opens and verifies the files, without decoding their pixels.

    Of more than `CHECK_AT_MOST` files an even sample is checked: what it misses is found while
    training.

    Args:
        paths: the files.
        why: says why a file cannot be read; by default asks Pillow.
        threads: how many files are opened at a time.

    Returns:
        The files that failed, and how many were checked.
    """
    count = min(len(paths), CHECK_AT_MOST)
    chosen = [paths[i * len(paths) // count] for i in range(count)]
    with ThreadPoolExecutor(threads) as pool:
        reasons = pool.map(why or _why_unreadable, chosen)
        named = zip(chosen, reasons, strict=True)
        return [Failure(str(path), reason) for path, reason in named if reason], count


def _why_unreadable(path: Path) -> str | None:
    from PIL import Image

    try:
        if path.stat().st_size == 0:
            return "the file is empty"
        with Image.open(path) as image:
            image.verify()
    except _decoding_errors() as error:
        return _reason(error, path)
    return None


def _decoding_errors() -> tuple[type[Exception], ...]:
    """What Pillow's readers raise on broken files, each format in its own way."""
    import struct

    from PIL import Image

    of_parsers = (ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, struct.error)
    return (OSError, Image.DecompressionBombError, MemoryError, *of_parsers)


def _reason(error: Exception, path: Path | None = None) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "not a picture that Pillow knows"
    text = str(error) if path is None else str(error).replace(str(path), "")
    text = text.strip(" :'\"") or type(error).__name__
    return text.splitlines()[0]


class EncodedPicture:
    """A picture file, on disk or in memory, decoded when it is used to uint8 RGB.

    Args:
        file: a path, or the contents of a file.
        formats: Pillow's names of the formats to try; all if None.
    """

    def __init__(self, file: Path | bytes, formats: tuple[str, ...] | None = None) -> None:
        self.file, self.formats = file, formats

    def _open(self) -> Path | BinaryIO:
        return io.BytesIO(self.file) if isinstance(self.file, bytes) else self.file

    def _unreadable(self, error: Exception) -> UnreadableError:
        return UnreadableError(_reason(error, None if isinstance(self.file, bytes) else self.file))

    def load(self) -> Tensor:
        """The whole picture, uint8 `[3, h, w]`.

        Raises:
            UnreadableError: the file cannot be decoded.
        """
        try:
            return _tensor(read_picture(self._open(), formats=self.formats))
        except _decoding_errors() as error:
            raise self._unreadable(error) from error

    def crop(self, pick: Pick, size: Size) -> Tensor:
        """`resize(picture[pick(h, w)], size)`, uint8 `[3, H, W]`; a JPEG is decoded small.

        Raises:
            UnreadableError: the file cannot be decoded.
        """
        from PIL import Image

        try:
            with Image.open(self._open(), formats=self.formats) as header:
                full_height, full_width = upright_size(header)
            box = pick(full_height, full_width)
            shrink = min(box[2] / size[0], box[3] / size[1])
            image = _tensor(read_picture(self._open(), shrink, self.formats))
        except _decoding_errors() as error:
            raise self._unreadable(error) from error
        return resized_crop(image, _scaled(box, full_height / image.shape[1], image), size)


def _tensor(picture: PILImage.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


class FolderPhotos:
    """Picture files, decoded when they are used (a JPEG at the size needed, not above).

    Args:
        paths: the files.
        labels: of each file; -1 if None.
    """

    channels = 3
    dtype = torch.uint8

    def __init__(self, paths: Sequence[Path], labels: Sequence[int] | None = None) -> None:
        self.paths = list(paths)
        self.labels = None if labels is None else list(labels)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def label(self, index: int) -> int:
        return NO_LABEL if self.labels is None else self.labels[index]

    def load(self, index: int) -> Tensor:
        """The whole picture, uint8 `[3, h, w]`.

        Raises:
            UnreadableError: the file cannot be decoded.
        """
        return EncodedPicture(self.paths[index]).load()

    def crop(self, index: int, pick: Pick, size: Size) -> Tensor:
        """`resize(picture[pick(height, width)], size)`, uint8 `[3, H, W]`.

        Raises:
            UnreadableError: the file cannot be decoded.
        """
        return EncodedPicture(self.paths[index]).crop(pick, size)


def _scaled(box: Box, factor: float, image: Tensor) -> Box:
    """`box` on a picture that was decoded `factor` times smaller, kept inside it."""
    top, left, height, width = (int(value / factor) for value in box)
    top, left = min(top, image.shape[1] - 1), min(left, image.shape[2] - 1)
    height = max(1, min(height, image.shape[1] - top))
    return top, left, height, max(1, min(width, image.shape[2] - left))
