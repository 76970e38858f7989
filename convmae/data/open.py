"""Opens the pictures at `--data_path`: what lies there decides which source reads them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from convmae.config.data import ReadOptions
from convmae.data.arrays import ARRAY_EXTENSION, ArrayPhotos
from convmae.data.demo import CROPS_PER_PHOTO, DemoPhotos
from convmae.data.errors import DataError, check_share
from convmae.data.folder import (
    PHOTO,
    FolderPhotos,
    find_pictures,
    refuse_suspected_nodata,
    survey,
    walk_pictures,
)
from convmae.data.idx import IdxPhotos, find_idx
from convmae.data.picture import WithChannels
from convmae.data.pillow import EXTENSIONS
from convmae.data.source import PhotoSource, Source, choose_balanced
from convmae.data.stream import ShardSource, open_shards

if TYPE_CHECKING:
    from convmae.data.errors import Failure
    from convmae.data.picture import Photos

SPLITS = ("train", "val")
VAL_FOLDERS = ("val", "test")
SHARD = ".tar"


def open_source(
    data_path: str | os.PathLike[str],
    split: str = "train",
    max_unreadable: float = 0.1,
    max_samples: int | None = None,
    seed: int = 0,
    reading: ReadOptions = ReadOptions(),  # noqa: B008 - frozen
) -> Source:
    """The pictures at `data_path`, their headers checked.

    - `demo`: the photographs inside scikit-image; `val` is the same.
    - A folder of pictures, flat or nested. With a `train` folder inside, that is read; `val` is the
      folder `val` or `test` inside. Where no picture lies directly in the folder of the split, the
      names of its sub-folders, sorted, are the classes, as in torchvision's `ImageFolder`; those of
      `val` are those of `train`.
    - The same with `.npy` arrays instead of pictures (`convmae.data.arrays`).
    - A folder with the IDX files of the MNIST family, packed or not, or with them in `raw` or
      `<name>/raw`; `val` is t10k.
    - WebDataset shards (`convmae.data.stream`): a folder with `.tar` files (or with `train` and
      `val` folders that have them), a pattern like `path/shard-{000000..000009}.tar`, or the same
      at an http or https address.

    Args:
        data_path: what to open.
        split: "train" or "val".
        max_unreadable: share of unreadable pictures above which the source is refused; of shards,
            share of damaged shards.
        max_samples: train on this many pictures only, as many of each class as can be.
        seed: of the choice of these.
        reading: how pictures are read.

    Raises:
        DataError: nothing there, nothing of the split, too much of it unreadable, or fewer pictures
            than `max_samples`.
        ValueError: `split` is neither "train" nor "val".
    """
    if split not in SPLITS:
        raise ValueError(f"split must be 'train' or 'val', got {split!r}")
    text = os.fspath(data_path)
    if text == "demo":
        demo = _with_channels(DemoPhotos(), reading, "the demo")
        limits = (max_unreadable, max_samples, seed)
        description = f"demo: {len(demo)} photographs of scikit-image"
        return _photo_source(demo, description, None, *limits, repeats=CROPS_PER_PHOTO, workers=0)
    folder = Path(text).expanduser()
    if not folder.is_dir():
        if text.endswith(SHARD) or _has_scheme(text):
            return _shard_source(text, split, max_unreadable, max_samples, reading)
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise DataError(f"--data_path {text!r} {what}; expected 'demo' or a folder of pictures")
    idx = find_idx(folder)
    if idx is not None:
        idx_photos = IdxPhotos(idx, split)
        description = f"{len(idx_photos)} pictures of {idx} ({split})"
        classes = list(idx_photos.classes)
        photos = _with_channels(idx_photos, reading, "IDX files")
        return _photo_source(photos, description, classes, max_unreadable, max_samples, seed)
    here = split_folder(folder, split, text)
    if _has_shards(here):
        return _shard_source(str(here), None, max_unreadable, max_samples, reading)
    return _folder_source(here, folder, max_unreadable, max_samples, seed, reading)


def _with_channels(photos: Photos, reading: ReadOptions, what: str) -> Photos:
    """8-bit pictures in memory with `--in_chans` channels.

    Raises:
        DataError: another option of reading is given, or the channels cannot be made.
    """
    given = [name for name in reading.given() if name in ("bands", "nodata")]
    if given:
        raise DataError(
            f"--{given[0]} has no effect on {what}, which are 8-bit pictures of "
            f"{photos.channels} channels; leave it out"
        )
    if reading.in_chans in (None, photos.channels):
        return photos
    if reading.in_chans not in (1, 3):
        raise DataError(
            f"--in_chans {reading.in_chans}: pictures of {what} can be read with 1 or 3 channels"
        )
    return WithChannels(photos, reading)


def _has_scheme(text: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", text) is not None


def _shard_source(
    where: str,
    split: str | None,
    max_unreadable: float,
    max_samples: int | None,
    reading: ReadOptions,
) -> ShardSource:
    if max_samples is not None:
        raise DataError(
            f"--max_samples {max_samples} cannot choose from shards, which are read in order; "
            "expected a folder of pictures, or write smaller shards"
        )
    return open_shards(where, split, max_unreadable, default_workers(), reading)


def split_folder(folder: Path, split: str, data_path: str) -> Path:
    """Where the pictures of `split` lie.

    Raises:
        DataError: there is no such folder, or there is a `val` but no `train`.
    """
    names = ("train",) if split == "train" else VAL_FOLDERS
    for name in names:
        if (folder / name).is_dir():
            return folder / name
    others = [name for name in VAL_FOLDERS if (folder / name).is_dir()]
    if split == "train" and not others:
        return folder
    looked = " or ".join(str(folder / name) for name in names)
    beside = f"; found {folder / others[0]} alone" if others else ""
    raise DataError(
        f"--data_path {data_path!r} has no {split} pictures: looked for {looked}{beside}"
    )


def _has_shards(folder: Path) -> bool:
    """Whether `folder` itself holds `.tar` files.

    Raises:
        DataError: it holds pictures as well.
    """
    names = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    shards = [name for name in names if name.endswith(SHARD)]
    others = [n for n in names if os.path.splitext(n)[1].lower() in EXTENSIONS | {ARRAY_EXTENSION}]
    if shards and others:
        raise _mixed_kinds(folder, min(shards), min(others))
    return bool(shards)


def _mixed_kinds(folder: Path, one: str, other: str) -> DataError:
    return DataError(
        f"--data_path: {folder} holds files of two kinds, {one} and {other}; expected pictures, "
        ".npy arrays or .tar shards, in a folder of their own"
    )


def _folder_source(
    here: Path,
    root: Path,
    max_unreadable: float,
    max_samples: int | None,
    seed: int,
    reading: ReadOptions,
) -> PhotoSource:
    paths = find_pictures(here, extensions=EXTENSIONS | {ARRAY_EXTENSION})
    classes = class_folders(root / "train" if (root / "train").is_dir() else here)
    labels = None if classes is None else _labels(paths, here, classes)
    photos, failures, description, notes = open_files(paths, labels, here, max_unreadable, reading)
    if classes is not None:
        description += f", {len(classes)} classes"
    description = "; ".join([description, *notes])
    return _photo_source(
        photos, description, classes, max_unreadable, max_samples, seed, failures=tuple(failures)
    )


def open_files(
    paths: list[Path],
    labels: list[int] | None,
    folder: Path,
    max_unreadable: float,
    reading: ReadOptions,
) -> tuple[Photos, list[Failure], str, list[str]]:
    """Picture files, or `.npy` files, their headers checked.

    Args:
        paths: the files.
        labels: of each; -1 if None.
        folder: where they lie, for messages.
        max_unreadable: share of unreadable pictures above which they are refused.
        reading: how they are read.

    Returns:
        The pictures, the failures, and for the log what they are and what is done to them.

    Raises:
        DataError: files of both kinds, too many that cannot be read, or float pictures with values
            that most likely mean that there are no data.
    """
    arrays = [path for path in paths if path.suffix.lower() == ARRAY_EXTENSION]
    if arrays and len(arrays) < len(paths):
        other = next(path for path in paths if path.suffix.lower() != ARRAY_EXTENSION)
        names = [str(os.path.relpath(path, folder)) for path in (arrays[0], other)]
        raise _mixed_kinds(folder, *names)
    if arrays:
        array_photos = ArrayPhotos(paths, labels, reading)
        check_share(array_photos.failures, len(array_photos), max_unreadable)
        refuse_suspected_nodata(array_photos, reading, str(folder))
        count, kind = len(array_photos), array_photos.kind
        description = f"{count} arrays of {kind.words}, axes {array_photos.layout}, in {folder}"
        return array_photos, array_photos.failures, description, []
    found = survey(paths, reading)
    check_share(found.failures, found.checked, max_unreadable)
    photos = FolderPhotos(paths, labels, reading, found.kind)
    refuse_suspected_nodata(photos, reading, str(folder))
    what = "pictures" if found.kind == PHOTO else f"pictures of {found.kind.words}"
    return photos, found.failures, f"{len(paths)} {what} in {folder}", found.notes


def class_folders(folder: Path) -> list[str] | None:
    """The sorted sub-folders that hold pictures; None where pictures lie in `folder` itself."""
    extensions = EXTENSIONS | {ARRAY_EXTENSION}
    names = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if next(walk_pictures(path, extensions), None) is not None:
                names.append(path.name)
        elif path.suffix.lower() in extensions:
            return None
    return names


def _labels(paths: list[Path], here: Path, classes: list[str]) -> list[int]:
    """The number of each picture's class folder.

    Raises:
        DataError: a picture lies in no folder, or in one that is no class.
    """
    number = {name: index for index, name in enumerate(classes)}
    labels = []
    for path in paths:
        parts = path.relative_to(here).parts
        name = parts[0] if len(parts) > 1 else None
        if name not in number:
            raise DataError(
                f"{path} belongs to none of the {len(classes)} classes of training "
                f"({', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}); expected a "
                f"folder of that name under {here}"
            )
        labels.append(number[name])
    return labels


def _photo_source(
    photos: Photos,
    description: str,
    classes: list[str] | None,
    max_unreadable: float,
    max_samples: int | None,
    seed: int,
    repeats: int = 1,
    workers: int | None = None,
    failures: tuple[Failure, ...] = (),
) -> PhotoSource:
    if max_samples is not None:
        broken = {failure.name for failure in failures}
        photos = choose_balanced(photos, max_samples, seed, broken, len(classes or "1"))
        description += f"; {max_samples} of them chosen"
        failures = ()
    if repeats > 1:
        description += f", {repeats * len(photos)} crops of them an epoch"
    return PhotoSource(
        photos,
        classes=classes,
        repeats=repeats,
        description=description,
        workers=default_workers() if workers is None else workers,
        failures=list(failures),
        max_unreadable=max_unreadable,
    )


def default_workers() -> int:
    """Loading processes: one for each core that this process may use but one, at most 8."""
    if hasattr(os, "sched_getaffinity"):
        return min(8, len(os.sched_getaffinity(0)) - 1)
    return min(8, (os.cpu_count() or 1) - 1)
