"""Picture files in folders, nested or flat: found, checked, and read by index."""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from convmae.config.data import ReadOptions
from convmae.data.errors import DataError, Failure, UnreadableError
from convmae.data.formats.decode import GREY, EncodedPicture, Header
from convmae.data.formats.pillow import EXTENSIONS
from convmae.data.formats.stored import Kind, suspected_nodata
from convmae.data.left_out import LeftOut, kind_of
from convmae.data.picture import NO_LABEL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from collections.abc import Set as AbstractSet

    from torch import Tensor

    from convmae.data.crops import PickBox, Size
    from convmae.data.picture import Photos

AS_USUAL = ReadOptions()
PHOTO = Kind(3, torch.uint8)
LOOKED_AT = 8  # float pictures that are searched for values that mean "no data"
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


def even_sample(paths: Sequence[Path]) -> list[Path]:
    """Up to `CHECK_AT_MOST` of the files, evenly spaced: what it misses is found while training."""
    count = min(len(paths), CHECK_AT_MOST)
    return [paths[i * len(paths) // count] for i in range(count)]


def check_readable(
    paths: Sequence[Path], find_reason: Callable[[Path], str | None] | None = None, threads: int = 8
) -> tuple[list[Failure], int]:
    """Opens and verifies the files (of many, an even sample), without decoding their pixels.

    Args:
        paths: the files.
        find_reason: why a file cannot be read, None if it can; by default the reader says.
        threads: how many files are opened at a time.

    Returns:
        The files that failed, and how many were checked.
    """
    chosen = even_sample(paths)
    with ThreadPoolExecutor(threads) as pool:
        reasons = pool.map(find_reason or _why_unreadable, chosen)
        named = zip(chosen, reasons, strict=True)
        return [Failure(str(path), reason) for path, reason in named if reason], len(chosen)


def _why_unreadable(path: Path) -> str | None:
    try:
        EncodedPicture(path).header()
    except UnreadableError as error:
        return str(error)
    return None


class Survey(NamedTuple):
    """What the headers of the files of a data set say.

    Attributes:
        kind: channels and dtype that most of them have, and all must have.
        failures: the files that are broken or of another kind.
        checked: how many headers were read.
        notes: what is done to the pictures that their owner may not expect, in words.
    """

    kind: Kind
    failures: list[Failure]
    checked: int
    notes: list[str]


def survey(paths: Sequence[Path], reading: ReadOptions = AS_USUAL, threads: int = 8) -> Survey:
    """Reads the headers of the files (of many, an even sample), without decoding their pixels."""
    chosen = even_sample(paths)

    def inspect(path: Path) -> Header | Failure:
        try:
            return EncodedPicture(path, reading).header()
        except UnreadableError as error:
            return Failure(str(path), str(error))

    with ThreadPoolExecutor(threads) as pool:
        headers = list(pool.map(inspect, chosen))
    readable = [header for header in headers if isinstance(header, Header)]
    kind = most_common_kind(readable)
    failures = []
    for path, header in zip(chosen, headers, strict=True):
        if isinstance(header, Failure):
            failures.append(header)
        elif header.kind != kind:
            failures.append(Failure(str(path), differs(header.kind, kind)))
    alike = [header for header in readable if header.kind == kind]
    return Survey(kind, failures, len(chosen), describe_headers(alike, reading))


def most_common_kind(headers: Sequence[Header]) -> Kind:
    """The kind that most of the pictures have, of several the one that comes first."""
    counts = Counter(header.kind for header in headers)
    return counts.most_common(1)[0][0] if counts else PHOTO


def differs(kind: Kind, wanted: Kind) -> str:
    """Why a picture is not read with the others."""
    return f"{kind.words}, where other pictures have {wanted}"


def describe_headers(headers: Sequence[Header], reading: ReadOptions) -> list[str]:
    """What is done to pictures that their owner may not expect, each counted, in words."""
    counts = Counter(note for header in headers for note in header.notes)
    notes = [f"{count} of {len(headers)} {note}" for note, count in counts.items()]
    if counts[GREY] == len(headers) > 0 and reading.in_chans is None:
        notes.append("they are read as RGB; --in_chans 1 reads one channel")
    return notes


def refuse_suspected_nodata(photos: Photos, reading: ReadOptions, data_path: str) -> None:
    """Looks at a few float pictures for values that are no data, unless `--nodata` is given.

    Raises:
        DataError: there are such values, which would spoil mean and deviation.
    """
    if photos.dtype != torch.float32 or reading.nodata is not None:
        return
    count = min(len(photos), LOOKED_AT)
    for index in (place * len(photos) // count for place in range(count)):
        try:
            image = photos.load(index)
        except UnreadableError:
            continue
        check_suspected(image, photos.name(index), data_path)


def check_suspected(image: Tensor, name: str, data_path: str) -> None:
    """Raises `DataError` where a float picture has values that are most likely no data."""
    value = suspected_nodata(image)
    if value is not None:
        raise DataError(
            f"--data_path {data_path!r}: {name} holds {value:.8g} far from all its other values, "
            f"which most likely means that there are no data; --nodata {value!r} leaves it out, "
            "--nodata nan keeps it"
        )


class FolderPhotos:
    """Picture files, decoded when they are used (a JPEG at the size needed, not above).

    Args:
        paths: the files.
        labels: of each file; -1 if None.
        reading: how they are read.
        kind: channels and dtype that each must have; 3 of uint8 by default.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Sequence[int] | None = None,
        reading: ReadOptions = AS_USUAL,
        kind: Kind = PHOTO,
    ) -> None:
        self.paths = list(paths)
        self.labels = None if labels is None else list(labels)
        self.reading, self.kind = reading, kind

    @property
    def channels(self) -> int:
        return self.kind.channels

    @property
    def dtype(self) -> torch.dtype:
        return self.kind.dtype

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def label(self, index: int) -> int:
        return NO_LABEL if self.labels is None else self.labels[index]

    def load(self, index: int) -> Tensor:
        """The whole picture, `[C, h, w]`.

        Raises:
            UnreadableError: the file cannot be decoded, or differs from the others.
        """
        return self._alike(EncodedPicture(self.paths[index], self.reading).load())

    def measured(self, index: int) -> Tensor:
        """`load` in float32, with NaN where there are no data.

        Raises:
            UnreadableError: the file cannot be decoded, or differs from the others.
        """
        picture = EncodedPicture(self.paths[index], self.reading)
        kind = picture.header().kind
        if kind != self.kind:
            raise UnreadableError(differs(kind, self.kind))
        return picture.measured()

    def crop(self, index: int, pick: PickBox, size: Size) -> Tensor:
        """`resize(picture[pick(height, width)], size)`, `[C, H, W]`.

        Raises:
            UnreadableError: the file cannot be decoded, or differs from the others.
        """
        return self._alike(EncodedPicture(self.paths[index], self.reading).crop(pick, size))

    def _alike(self, image: Tensor) -> Tensor:
        kind = Kind(len(image), image.dtype)
        if kind != self.kind:
            raise UnreadableError(differs(kind, self.kind))
        return image
