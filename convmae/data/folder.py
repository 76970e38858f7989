"""Folders of pictures: nested or flat, no class folders needed, unreadable files told apart."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from convmae.data.crops import Box, Failure, UnreadableError, resized_crop
from convmae.data.picture import DataError, read_picture, upright_size

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

JPEG = {".jpg", ".jpeg", ".jpe", ".jfif"}
NETPBM = {".ppm", ".pgm", ".pbm", ".pnm"}
EXTENSIONS = JPEG | NETPBM | {".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".tga"}
EXTENSIONS |= {".jp2", ".avif"}
CHECK_AT_MOST = 20_000  # headers read before training; of more files, an even sample


def find_pictures(folder: str | Path, option: str = "--data_path") -> list[Path]:
    """Every picture file under `folder`, at any depth, in the same order on every machine.

    Files are told by their extension (`EXTENSIONS`, either case); names that begin with a dot are
    left out; links to folders are followed, each folder once.

    Args:
        folder: where to look.
        option: the flag to name in the error.

    Raises:
        DataError: `folder` does not exist, is not a folder, or holds no picture.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise DataError(f"{option} {str(folder)!r} {what}; expected 'demo' or a folder of pictures")
    found: list[Path] = []
    seen: set[str] = set()
    for here, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS:
                found.append(Path(here, name))
    if not found:
        kinds = " ".join(sorted(extension[1:] for extension in EXTENSIONS))
        raise DataError(f"{option} {str(folder)!r} holds no picture (looked for: {kinds})")
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def check_readable(paths: Sequence[Path], threads: int = 8) -> tuple[list[Failure], int]:
    """Opens and verifies the files, without decoding their pixels.

    Of more than `CHECK_AT_MOST` files an even sample is checked: what it misses is found while
    training.

    Returns:
        The files that failed, as `(index into paths, reason)`, and how many were checked.
    """
    count = min(len(paths), CHECK_AT_MOST)
    chosen = [i * len(paths) // count for i in range(count)]
    with ThreadPoolExecutor(threads) as pool:
        reasons = pool.map(lambda index: _why_unreadable(paths[index]), chosen)
        return [(i, why) for i, why in zip(chosen, reasons, strict=True) if why], count


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


def _reason(error: Exception, path: Path) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "not a picture that Pillow knows"
    text = str(error).replace(str(path), "").strip(" :'\"") or type(error).__name__
    return text.splitlines()[0]


class FolderPhotos:
    """Picture files, decoded when they are cropped (a JPEG at the size needed, not above)."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def crop(self, index: int, pick: Callable[[int, int], Box], size: tuple[int, int]) -> Tensor:
        """`resize(picture[pick(height, width)], size)`, uint8 `[3, H, W]`.

        Raises:
            UnreadableError: the file cannot be decoded.
        """
        from PIL import Image

        path = self.paths[index]
        try:
            with Image.open(path) as header:
                full_height, full_width = upright_size(header)
            box = pick(full_height, full_width)
            picture = read_picture(path, shrink=min(box[2] / size[0], box[3] / size[1]))
            image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        except _decoding_errors() as error:
            raise UnreadableError(_reason(error, path)) from error
        return resized_crop(image, _scaled(box, full_height / image.shape[1], image), size)


def _scaled(box: Box, factor: float, image: Tensor) -> Box:
    """`box` on a picture that was decoded `factor` times smaller, kept inside it."""
    top, left, height, width = (int(value / factor) for value in box)
    top, left = min(top, image.shape[1] - 1), min(left, image.shape[2] - 1)
    height = max(1, min(height, image.shape[1] - top))
    return top, left, height, max(1, min(width, image.shape[2] - left))
