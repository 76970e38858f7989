"""Opens the pictures at `--data_path`: what lies there decides which source reads them."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convmae.config.data import ReadOptions
from convmae.data.arrays import ARRAY_EXTENSION, ArrayPhotos
from convmae.data.choice import choose_pictures
from convmae.data.class_folders import class_folders, empty_folders, why_no_classes
from convmae.data.demo import CROPS_PER_PHOTO, DEMO_FILES, DemoPhotos
from convmae.data.errors import DataError, check_share
from convmae.data.fingerprint import file_entries
from convmae.data.folder import (
    PHOTO,
    FolderPhotos,
    find_pictures,
    refuse_suspected_nodata,
    survey,
    walk_pictures,
)
from convmae.data.formats.pillow import EXTENSIONS
from convmae.data.idx import IdxPhotos, find_idx, is_idx, only_split
from convmae.data.left_out import LeftOut, kind_of
from convmae.data.listed import LIST_EXTENSION, listed_paths, one_pattern
from convmae.data.loader import default_workers
from convmae.data.picture import WithChannels
from convmae.data.sizes import SHARD, SIZES_FILE
from convmae.data.source import PhotoSource, Source, choose_balanced
from convmae.data.stream import ShardSource, open_shards

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from convmae.config.data import PictureChoice
    from convmae.data.classes import NumberLabels
    from convmae.data.errors import Failure
    from convmae.data.picture import Photos

SPLITS = ("train", "val")
VAL_FOLDERS = ("val", "test")


def open_source(
    data_path: str | os.PathLike[str] | Sequence[str],
    split: str | None = "train",
    max_unreadable: float = 0.1,
    max_samples: int | None = None,
    seed: int = 0,
    undivided: bool = False,
    labelled: bool = True,
    reading: ReadOptions = ReadOptions(),  # noqa: B008 - frozen
    choice: PictureChoice | None = None,
) -> Source:
    """The pictures at `data_path`, their headers checked.

    - `demo`: the photographs inside scikit-image; `val` is the same.
    - A folder of pictures, flat or nested. With a `train` folder inside, that is read; `val` is the
      folder `val` or `test` inside. Where no picture lies directly in the folder of the split, the
      names of its sub-folders with pictures, sorted, are the classes, as in torchvision's
      `ImageFolder`; each split has its own, to be matched by name.
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
        undivided: for `val`, read all pictures where they are not divided into splits.
        labelled: IDX files need their labels. If False, they have labels if these are there.
        reading: how pictures are read.
        choice: which pictures of a folder, in place of folders for the splits.

    Raises:
        DataError: nothing there, nothing of the split, too much of it unreadable, fewer pictures
            than `max_samples`, or a `choice` that cannot be made.
        ValueError: `split` is none of these.
    """
    if split not in (*SPLITS, None):
        raise ValueError(f"split must be 'train' or 'val', got {split!r}; None is all")
    if choice is not None:
        _check_choice(data_path, choice)
    if isinstance(data_path, tuple | list):
        if len(data_path) > 1 and all(name.endswith(SHARD) for name in data_path):
            return _shard_source(
                one_pattern(data_path), split, max_unreadable, max_samples, reading
            )
        if len(data_path) != 1:
            return _listed_source(data_path, split, max_unreadable, max_samples, seed, reading)
        data_path = data_path[0]
    text = os.fspath(data_path)  # type: ignore[arg-type]
    if text == "demo":
        demo = _with_channels(DemoPhotos(), reading, "the demo")
        limits = (max_unreadable, max_samples, seed)
        description = f"demo: {len(demo)} photographs of scikit-image"
        notes = _without_effect(("layout", "pages"), reading, "the demo")
        description = "; ".join([description, *notes])
        source = _photo_source(demo, description, None, *limits, repeats=CROPS_PER_PHOTO, workers=0)
        source.entries = lambda: [(name, "") for name in DEMO_FILES]
        return source
    folder = Path(text).expanduser()
    if not folder.is_dir():
        if text.endswith(SHARD) or _has_scheme(text):
            return _shard_source(text, split, max_unreadable, max_samples, reading, undivided)
        if split is None and folder.is_file():
            return _listed_source((text,), None, max_unreadable, max_samples, seed, reading)
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise DataError(f"--data_path {text!r} {what}; expected 'demo' or a folder of pictures")
    idx = find_idx(folder)
    if idx is not None:
        _refuse_choice(choice, text, "IDX files")
        idx_photos = IdxPhotos(idx, split or only_split(idx), labelled)
        description = f"{len(idx_photos)} pictures of {idx} ({idx_photos.split})"
        notes = _without_effect(("layout", "pages"), reading, "IDX files")
        description = "; ".join([description, *notes])
        classes = None if idx_photos.labels is None else list(idx_photos.classes)
        source = _photo_source(
            _with_channels(idx_photos, reading, "IDX files"),
            description,
            classes,
            *(max_unreadable, max_samples, seed),
            numbers=idx_photos.number_labels(),
            left_out=_beside(idx, is_idx, "files beside the IDX files"),
            root=_root(idx),
        )
        source.entries = partial(file_entries, idx_photos.paths, idx)
        return source
    here = folder if split is None else _folder_of(folder, split, text, undivided, choice)
    beside: list[LeftOut] = []
    if here != folder:
        beside = _beside(folder, lambda name: name in (*SPLITS, *VAL_FOLDERS), "files")
    if _has_shards(here):
        _refuse_choice(choice, text, "shards")
        shards = _shard_source(str(here), None, max_unreadable, max_samples, reading)
        beside += _beside(here, lambda name: name.endswith(SHARD) or name == SIZES_FILE, "files")
        shards.left_out = [*beside, *shards.left_out]
        return shards
    if split is None:
        _check_no_split_shards(folder)
    source = _folder_source(here, max_unreadable, max_samples, seed, reading, _root(folder), choice)
    source.left_out = [*beside, *source.left_out]
    return source


def _check_choice(data_path: Any, choice: PictureChoice) -> None:
    """Raises `DataError` unless `data_path` is one folder."""
    many = isinstance(data_path, tuple | list)
    if many and len(data_path) != 1:
        _refuse_choice(choice, data_path[0], f"{len(data_path)} places")
    text = os.fspath(data_path[0] if many else data_path)
    if not Path(text).expanduser().is_dir() and (text == "demo" or Path(text).exists()):
        _refuse_choice(choice, text, "no folder")


def _refuse_choice(choice: PictureChoice | None, data_path: str, found: str) -> None:
    """Raises `DataError` where pictures are to be chosen from what is no folder of them."""
    if choice is not None:
        raise DataError(
            f"--{choice.option} chooses pictures of one folder, but --data_path {data_path!r} is "
            f"{found}; leave it out, or give a folder of pictures"
        )


def _folder_of(
    folder: Path, split: str, data_path: str, undivided: bool, choice: PictureChoice | None
) -> Path:
    """Where the pictures of `split` lie, or those of which a part is chosen for it."""
    if choice is None:
        return split_folder(folder, split, data_path, undivided)
    if not choice.val_share:
        return split_folder(folder, split, data_path, undivided=True)
    if (folder / "val").is_dir():
        raise DataError(
            f"--val_share {choice.val_share:g} makes a val split, but there is one already in "
            f"{folder / 'val'}; leave it out"
        )
    return folder / "train" if (folder / "train").is_dir() else folder


def _beside(folder: Path, is_read: Callable[[str], bool], what: str) -> list[LeftOut]:
    """What lies in `folder` itself besides the names that are read; none if there is nothing."""
    left_out = LeftOut(f"{what} in {folder}")
    for entry in os.scandir(folder):
        if not is_read(entry.name):
            left_out.add("folders" if entry.is_dir() else kind_of(entry.name), entry.name)
    return [left_out] if left_out.total else []


def _root(folder: Path) -> str:
    """What the paths of all files in a folder begin with."""
    return os.path.join(folder, "")


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
    reading: ReadOptions,
) -> PhotoSource:
    """Files, lists of files and folders of files, in that order."""
    if split is not None:
        raise DataError(
            f"--split {split} is for one folder, but --data_path names {len(names)} places"
        )
    extensions = EXTENSIONS | {ARRAY_EXTENSION}
    paths: list[Path] = []
    left_out = LeftOut()
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            paths += find_pictures(path, extensions=extensions, left_out=left_out)
        elif path.suffix.lower() == LIST_EXTENSION and path.is_file():
            paths += listed_paths(path)
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
    limits = (max_unreadable, max_samples, seed, reading)
    return _files_source(paths, None, None, where, *limits, root, left_out)


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
    undivided: bool = False,
) -> ShardSource:
    if max_samples is not None:
        raise DataError(
            f"--max_samples {max_samples} cannot choose from shards, which are read in order; "
            "expected a folder of pictures, or write smaller shards"
        )
    return open_shards(where, split, max_unreadable, default_workers(), reading, undivided)


def split_folder(folder: Path, split: str, data_path: str, undivided: bool = False) -> Path:
    """Where the pictures of `split` lie; `folder` itself if they are `undivided`, if that may be.

    A folder `train` among other folders with pictures, but without `val` and `test`, is a class.

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
    if undivided and split == "val":
        if not (folder / "train").is_dir() or _has_other_pictures(folder, "train"):
            return folder
        others = ["train"]
    looked = " or ".join(str(folder / name) for name in names)
    beside = f"; found {folder / others[0]} alone" if others else ""
    beside += ", which --split train reads" if undivided and others else ""
    lists = "; lists of names (--val_list) or a share (--val_share) can divide one folder"
    beside += lists if split == "val" and not undivided else ""
    raise DataError(
        f"--data_path {data_path!r} has no {split} pictures: looked for {looked}{beside}"
    )


def _has_other_pictures(folder: Path, name: str) -> bool:
    """Whether there are pictures in `folder` outside its sub-folder `name`."""
    inside = folder / name
    paths = walk_pictures(folder, EXTENSIONS | {ARRAY_EXTENSION})
    return any(not path.is_relative_to(inside) for path in paths)


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
    max_unreadable: float,
    max_samples: int | None,
    seed: int,
    reading: ReadOptions,
    root: str,
    choice: PictureChoice | None = None,
) -> PhotoSource:
    left_out = LeftOut(f"files in {here}")
    paths = find_pictures(here, extensions=EXTENSIONS | {ARRAY_EXTENSION}, left_out=left_out)
    names: list[LeftOut] = []
    if choice is not None:
        paths, names = choose_pictures(paths, here, choice, max_unreadable, left_out)
    classes, labels = class_folders(paths, here) or (None, None)
    empty = () if classes is None else empty_folders(here, classes)
    for name in empty:
        left_out.add("folders without a picture", name)
    limits = (max_unreadable, max_samples, seed, reading)
    source = _files_source(paths, labels, classes, str(here), *limits, root, left_out)
    source.entries = partial(file_entries, paths, here)
    source.left_out = [*source.left_out, *names]
    source.empty_classes = empty
    if classes is None:
        source.no_classes = why_no_classes(paths, here)
    return source


def _files_source(
    paths: list[Path],
    labels: list[int] | None,
    classes: list[str] | None,
    where: str,
    max_unreadable: float,
    max_samples: int | None,
    seed: int,
    reading: ReadOptions,
    root: str,
    left_out: LeftOut,
) -> PhotoSource:
    """Pictures or arrays in files."""
    photos, failures, description, notes = open_files(paths, labels, where, max_unreadable, reading)
    if classes is not None:
        description += f", {len(classes)} classes"
    description = "; ".join([description, *notes])
    return _photo_source(
        photos,
        description,
        classes,
        max_unreadable,
        max_samples,
        seed,
        failures=tuple(failures),
        left_out=[left_out] if left_out.total else [],
        root=root,
    )


def open_files(
    paths: list[Path],
    labels: list[int] | None,
    where: str,
    max_unreadable: float,
    reading: ReadOptions,
) -> tuple[Photos, list[Failure], str, list[str]]:
    """Picture files, or `.npy` files, their headers checked.

    Args:
        paths: the files.
        labels: of each; -1 if None.
        where: they lie, for messages.
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
        names = [str(path).removeprefix(_root(Path(where))) for path in (arrays[0], other)]
        raise _mixed_kinds(where, *names)
    if arrays:
        array_photos = ArrayPhotos(paths, labels, reading)
        check_share(array_photos.failures, len(array_photos), max_unreadable)
        refuse_suspected_nodata(array_photos, reading, where)
        count, kind = len(array_photos), array_photos.kind
        description = f"{count} arrays of {kind.words}, axes {array_photos.layout}, in {where}"
        notes = _without_effect(("pages",), reading, "arrays")
        return array_photos, array_photos.failures, description, notes
    found = survey(paths, reading)
    check_share(found.failures, found.checked, max_unreadable)
    photos = FolderPhotos(paths, labels, reading, found.kind)
    refuse_suspected_nodata(photos, reading, where)
    what = "pictures" if found.kind == PHOTO else f"pictures of {found.kind.words}"
    notes = [*found.notes, *_without_effect(("layout",), reading, "picture files")]
    return photos, found.failures, f"{len(paths)} {what} in {where}", notes


def _without_effect(names: tuple[str, ...], reading: ReadOptions, what: str) -> list[str]:
    """What to tell of options that are given, and mean nothing for pictures of this kind."""
    given = reading.given()
    return [f"--{name} {given[name]} has no effect on {what}" for name in names if name in given]


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
    numbers: NumberLabels | None = None,
    left_out: Sequence[LeftOut] = (),
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
        numbers=numbers,
        left_out=left_out,
        root=root,
    )
