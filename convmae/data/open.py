"""Opens the pictures at `--data_path`: what lies there decides which source reads them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from convmae.data.arrays import ARRAY_EXTENSION, ArrayPhotos
from convmae.data.demo import CROPS_PER_PHOTO, DemoPhotos
from convmae.data.errors import DataError, check_share
from convmae.data.folder import FolderPhotos, check_readable, find_pictures, walk_pictures
from convmae.data.idx import IdxPhotos, find_idx, only_split
from convmae.data.pillow import EXTENSIONS
from convmae.data.source import PhotoSource, Source, choose_balanced
from convmae.data.stream import ShardSource, open_shards

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convmae.data.errors import Failure
    from convmae.data.picture import Photos

SPLITS = ("train", "val")
VAL_FOLDERS = ("val", "test")
SHARD = ".tar"
LIST_EXTENSION = ".txt"  # of a file with the path of a picture in each line


def open_source(
    data_path: str | os.PathLike[str] | Sequence[str],
    split: str | None = "train",
    max_unreadable: float = 0.1,
    max_samples: int | None = None,
    seed: int = 0,
    labelled: bool = True,
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
    - With `split=None`, a picture, a `.npy` array, a `.txt` file with a path in each line
      (relative ones from its folder), or several of these and of folders; they have no classes.

    Args:
        data_path: what to open.
        split: "train" or "val"; None for every picture that lies at `data_path`.
        max_unreadable: share of unreadable pictures above which the source is refused; of shards,
            share of damaged shards.
        max_samples: train on this many pictures only, as many of each class as can be.
        seed: of the choice of these.
        labelled: a split has the classes of train, and IDX files need their labels. If False,
            pictures have labels where there are some.

    Raises:
        DataError: nothing there, nothing of the split, too much of it unreadable, or fewer pictures
            than `max_samples`.
        ValueError: `split` is none of these.
    """
    if split not in (*SPLITS, None):
        raise ValueError(f"split must be 'train' or 'val', got {split!r}; None is all")
    if isinstance(data_path, tuple | list):
        if len(data_path) > 1 and all(name.endswith(SHARD) for name in data_path):
            return _shard_source(_one_pattern(data_path), split, max_unreadable, max_samples)
        if len(data_path) != 1:
            return _listed_source(data_path, split, max_unreadable, max_samples, seed)
        data_path = data_path[0]
    text = os.fspath(data_path)  # type: ignore[arg-type]
    if text == "demo":
        demo, limits = DemoPhotos(), (max_unreadable, max_samples, seed)
        description = f"demo: {len(demo)} photographs of scikit-image"
        return _photo_source(demo, description, None, *limits, repeats=CROPS_PER_PHOTO, workers=0)
    folder = Path(text).expanduser()
    if not folder.is_dir():
        if text.endswith(SHARD) or _has_scheme(text):
            return _shard_source(text, split, max_unreadable, max_samples)
        if split is None and folder.is_file():
            return _listed_source((text,), None, max_unreadable, max_samples, seed)
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise DataError(f"--data_path {text!r} {what}; expected 'demo' or a folder of pictures")
    idx = find_idx(folder)
    if idx is not None:
        idx_photos = IdxPhotos(idx, split or only_split(idx), labelled)
        description = f"{len(idx_photos)} pictures of {idx} ({idx_photos.split})"
        classes = None if idx_photos.labels is None else list(idx_photos.classes)
        limits = (max_unreadable, max_samples, seed)
        return _photo_source(idx_photos, description, classes, *limits, root=_root(idx))
    here = folder if split is None else split_folder(folder, split, text)
    if _has_shards(here):
        return _shard_source(str(here), None, max_unreadable, max_samples)
    if split is None:
        _check_no_split_shards(folder)
    of_train = labelled and here != folder and (folder / "train").is_dir()
    limits = (max_unreadable, max_samples, seed)
    return _folder_source(here, folder / "train" if of_train else here, *limits, _root(folder))


def _root(folder: Path) -> str:
    """What the paths of all files in a folder begin with."""
    return os.path.join(folder, "")


def _one_pattern(names: Sequence[str]) -> str:
    """A pattern of shards that stands for these names, as a shell makes them of `*.tar`."""
    special = next((name for name in names if set(name) & set("{},\\")), None)
    if special is not None:
        raise DataError(
            f"--data_path {special!r}: shards that are named one by one have no braces, commas or "
            "backslashes in their names; give their folder"
        )
    return "{" + ",".join(names) + "}"


def _check_no_split_shards(folder: Path) -> None:
    """Raises `DataError` where the folders of splits inside `folder` hold shards."""
    inside = [folder / name for name in ("train", *VAL_FOLDERS)]
    found = [str(path) for path in inside if path.is_dir() and any(path.glob(f"*{SHARD}"))]
    if found:
        raise DataError(
            f"--data_path {str(folder)!r} holds shards in {' and '.join(found)}; give one of these "
            "folders, or --split"
        )


def _listed_source(
    names: Sequence[str],
    split: str | None,
    max_unreadable: float,
    max_samples: int | None,
    seed: int,
) -> PhotoSource:
    """Files, lists of files and folders of files, in that order."""
    if split is not None:
        raise DataError(
            f"--split {split} is for one folder, but --data_path names {len(names)} places"
        )
    extensions = EXTENSIONS | {ARRAY_EXTENSION}
    paths: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            paths += find_pictures(path, extensions=extensions)
        elif path.suffix.lower() == LIST_EXTENSION and path.is_file():
            paths += _listed_paths(path)
        elif path.suffix.lower() in extensions and path.is_file():
            paths.append(path)
        else:
            what = "is no picture" if path.is_file() else "does not exist"
            kinds = " ".join(sorted(extension[1:] for extension in extensions))
            raise DataError(
                f"--data_path {name!r} {what}; expected a folder, shards, a {LIST_EXTENSION} file "
                f"of paths, or a file of one of these kinds: {kinds}"
            )
    one = len(names) == 1
    root = _root(Path(names[0]).expanduser().parent) if one else ""
    where = names[0] if one else f"{names[0]} and {len(names) - 1} more"
    return _files_source(paths, None, None, where, max_unreadable, max_samples, seed, root)


def _listed_paths(file: Path) -> list[Path]:
    """The paths in the lines of a text file.

    A file that does not exist is a picture that cannot be read, if others do.

    Raises:
        DataError: it is no text, has no path, or none that exists.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--data_path {str(file)!r} is no list of paths: {error}") from error
    paths = [file.parent / Path(line.strip()).expanduser() for line in lines if line.strip()]
    if not paths:
        raise DataError(f"--data_path {str(file)!r} names no file; expected a path in each line")
    if not any(path.is_file() for path in paths):
        raise DataError(
            f"--data_path {str(file)!r}: none of the {len(paths)} files that it names exists, the "
            f"first is {paths[0]}; relative paths begin at the folder of the list"
        )
    return paths


def _has_scheme(text: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", text) is not None


def _shard_source(
    where: str, split: str | None, max_unreadable: float, max_samples: int | None
) -> ShardSource:
    if max_samples is not None:
        raise DataError(
            f"--max_samples {max_samples} cannot choose from shards, which are read in order; "
            "expected a folder of pictures, or write smaller shards"
        )
    return open_shards(where, split, max_unreadable, default_workers())


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


def _mixed_kinds(folder: Path | str, one: str, other: str) -> DataError:
    return DataError(
        f"--data_path: {folder} holds files of two kinds, {one} and {other}; expected pictures, "
        ".npy arrays or .tar shards, in a folder of their own"
    )


def _folder_source(
    here: Path,
    classes_of: Path,
    max_unreadable: float,
    max_samples: int | None,
    seed: int,
    root: str,
) -> PhotoSource:
    paths = find_pictures(here, extensions=EXTENSIONS | {ARRAY_EXTENSION})
    classes = class_folders(classes_of)
    labels = None if classes is None else _labels(paths, here, classes)
    limits = (max_unreadable, max_samples, seed)
    return _files_source(paths, labels, classes, str(here), *limits, root)


def _files_source(
    paths: list[Path],
    labels: list[int] | None,
    classes: list[str] | None,
    where: str,
    max_unreadable: float,
    max_samples: int | None,
    seed: int,
    root: str,
) -> PhotoSource:
    """Pictures or arrays in files."""
    arrays = [path for path in paths if path.suffix.lower() == ARRAY_EXTENSION]
    description = f"{len(paths)} pictures in {where}"
    if not arrays:
        failures, checked = check_readable(paths)
        check_share(failures, checked, max_unreadable)
        photos: Photos = FolderPhotos(paths, labels)
    elif len(arrays) < len(paths):
        other = next(path for path in paths if path.suffix.lower() != ARRAY_EXTENSION)
        names = (str(path).removeprefix(_root(Path(where))) for path in (arrays[0], other))
        raise _mixed_kinds(where, *names)
    else:
        array_photos = ArrayPhotos(paths, labels)
        failures = array_photos.failures
        check_share(failures, len(array_photos), max_unreadable)
        photos = array_photos
        kind = f"{photos.channels} channels of {str(photos.dtype).removeprefix('torch.')}"
        description = f"{len(photos)} arrays of {kind} in {where}"
    if classes is not None:
        description += f", {len(classes)} classes"
    return _photo_source(
        photos,
        description,
        classes,
        max_unreadable,
        max_samples,
        seed,
        failures=tuple(failures),
        root=root,
    )


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
    root: str = "",
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
        root=root,
    )


def default_workers() -> int:
    """Loading processes: one for each core that this process may use but one, at most 8."""
    if hasattr(os, "sched_getaffinity"):
        return min(8, len(os.sched_getaffinity(0)) - 1)
    return min(8, (os.cpu_count() or 1) - 1)
