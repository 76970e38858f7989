"""Picture files in folders, nested or flat: found, checked, and read by index."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from convmae.data.errors import DataError, Failure
from convmae.data.left_out import LeftOut, kind_of
from convmae.data.picture import NO_LABEL
from convmae.data.pillow import EXTENSIONS, EncodedPicture, why_unreadable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from collections.abc import Set as AbstractSet

    from torch import Tensor

    from convmae.data.crops import PickBox, Size

CHECK_AT_MOST = 20_000  # headers read before training; of more files, an even sample


def find_pictures(
    folder: str | Path,
    option: str = "--data_path",
    extensions: AbstractSet[str] = frozenset(EXTENSIONS),
    left_out: LeftOut | None = None,
) -> list[Path]:
    """Every picture file under `folder`, at any depth, in the same order on every machine.

    The extension decides, in either case. Names that begin with a dot are left out; links to
    folders are followed, each folder once.

    Args:
        folder: where to look.
        option: the flag to name in the error.
        extensions: in lower case, with the dot.
        left_out: counts what is no picture.

    Raises:
        DataError: `folder` does not exist, is not a folder, or holds no picture.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise DataError(f"{option} {str(folder)!r} {what}; expected 'demo' or a folder of pictures")
    others = LeftOut() if left_out is None else left_out
    found = list(walk_pictures(root, extensions, others))
    if not found:
        kinds = " ".join(sorted(extension[1:] for extension in extensions))
        there = f"; {others}" if others.total else ""
        raise DataError(f"{option} {str(folder)!r} holds no picture (looked for: {kinds}){there}")
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def walk_pictures(
    root: Path,
    extensions: AbstractSet[str] = frozenset(EXTENSIONS),
    left_out: LeftOut | None = None,
) -> Iterator[Path]:
    """The files that `find_pictures` finds, one by one, in no order; counts the others."""
    left_out = LeftOut() if left_out is None else left_out

    def name_of(path: str) -> str:
        return Path(path).relative_to(root).as_posix()

    def unopened(error: OSError) -> None:
        left_out.add("folders that cannot be opened", name_of(error.filename))

    seen: set[str] = set()
    for here, folders, files in os.walk(root, onerror=unopened, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            left_out.add("folders that a link shows again", name_of(here))
            continue
        seen.add(real)
        for name in (*folders, *files):
            if name.startswith("."):
                left_out.add("hidden", name_of(os.path.join(here, name)))
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.startswith("."):
                continue
            if os.path.splitext(name)[1].lower() in extensions:
                yield Path(here, name)
            else:
                left_out.add(kind_of(name), name_of(os.path.join(here, name)))


def check_readable(
    paths: Sequence[Path], find_reason: Callable[[Path], str | None] | None = None, threads: int = 8
) -> tuple[list[Failure], int]:
    """Opens and verifies the files, without decoding their pixels.

    Of more than `CHECK_AT_MOST` files an even sample is checked: what it misses is found while
    training.

    Args:
        paths: the files.
        find_reason: why a file cannot be read, None if it can; by default Pillow says.
        threads: how many files are opened at a time.

    Returns:
        The files that failed, and how many were checked.
    """
    count = min(len(paths), CHECK_AT_MOST)
    chosen = [paths[i * len(paths) // count] for i in range(count)]
    with ThreadPoolExecutor(threads) as pool:
        reasons = pool.map(find_reason or why_unreadable, chosen)
        named = zip(chosen, reasons, strict=True)
        return [Failure(str(path), reason) for path, reason in named if reason], count


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

    def crop(self, index: int, pick: PickBox, size: Size) -> Tensor:
        """`resize(picture[pick(height, width)], size)`, uint8 `[3, H, W]`.

        Raises:
            UnreadableError: the file cannot be decoded.
        """
        return EncodedPicture(self.paths[index]).crop(pick, size)
