"""Where pictures and label maps of a split lie, and which label map belongs to which picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from convmae.data.arrays import ARRAY_EXTENSION
from convmae.data.errors import DataError
from convmae.data.folder import find_pictures
from convmae.data.formats.pillow import EXTENSIONS, JPEG
from convmae.data.left_out import LeftOut

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from collections.abc import Set as AbstractSet

    from convmae.config.label_maps import LabelMapConfig

# Names of folders, in any case; the first that is there counts.
IMAGE_FOLDERS = (
    *("images", "image", "imgs", "img", "JPEGImages", "IRSTD1k_Img", "vi", "vis", "visible"),
    *("rgb", "pictures"),
)
LABEL_FOLDERS = (
    *("SegmentationClassAug", "SegmentationClass", "SegmentationClassOne", "Segmentation_labels"),
    *("IRSTD1k_Label", "masks", "mask", "labels", "label", "label_maps", "annotations"),
)
SPLIT_FOLDERS = {"train": ("train", "training"), "val": ("val", "validation", "test", "testing")}
LISTS = {"train": ("train", "trainval"), "val": ("val", "test")}  # names of lists begin so
LIST_PLACES = (
    *("{}.txt", "ImageSets/Segmentation/{}.txt", "splits/{}.txt", "img_idx/{}.txt"),
    *("{}_*.txt", "img_idx/{}_*.txt"),
)
READ = frozenset(EXTENSIONS | {ARRAY_EXTENSION})
NAMED_AT_MOST = 5  # files in a message


@dataclass(frozen=True)
class Places:
    """Where the pictures of a split lie.

    Attributes:
        images, labels: folders of pictures and of label maps.
        second: the folder of the second pictures, if there are any.
        names: the file of the names of the pictures that belong to the split; None for all.
    """

    images: Path
    labels: Path
    second: Path | None = None
    names: Path | None = None

    def __str__(self) -> str:
        second = "" if self.second is None else f" and {self.second}"
        names = "" if self.names is None else f", names in {self.names}"
        return f"{self.images}{second}, label maps in {self.labels}{names}"


@dataclass(frozen=True)
class Files:
    """The files of a split; what is at the same place in the lists belongs together.

    Attributes:
        images, labels: one label map for each picture.
        second: one for each picture; empty where there are none.
        left_out: what lies beside them and is not read.
    """

    images: list[Path]
    labels: list[Path]
    second: list[Path]
    left_out: list[LeftOut]


def find_places(
    data_path: str, split: str, options: LabelMapConfig, undivided: bool = False
) -> Places:
    """The folders of a split.

    One of these, `IMAGES` and `LABELS` being usual names or those of the options:
    `data_path/train/IMAGES` beside `data_path/train/LABELS`; `data_path/IMAGES/train` and
    `data_path/LABELS/train`; or `data_path/IMAGES` and `data_path/LABELS` with lists of names.

    Args:
        data_path: the data set.
        split: "train" or "val".
        options: of label maps.
        undivided: for `val`, take all pictures where nothing divides them.

    Raises:
        DataError: there are no such folders; the message says what was looked for.
    """
    root = Path(data_path).expanduser()
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise DataError(
            f"--data_path {data_path!r} {what}; expected a folder with pictures and label maps"
        )
    wanted = options.train_list if split == "train" else options.val_list
    base = None if wanted else _folder_of(root, SPLIT_FOLDERS[split])
    image_names = (options.image_folder,) if options.image_folder else IMAGE_FOLDERS
    if base is None or _folder_of(base, image_names) is None:
        base = root
    label_names = (options.label_folder,) if options.label_folder else LABEL_FOLDERS
    images = _needed(base, image_names, "pictures", "image_folder", data_path)
    labels = _needed(base, label_names, "label maps", "label_folder", data_path)
    second = None
    if options.second_images is not None:
        names = (options.second_images,)
        second = _needed(base, names, "second pictures", "second_images", data_path)
    if base != root:
        return Places(images, labels, second)
    inside = None if wanted else _folder_of(images, SPLIT_FOLDERS[split])
    if inside is not None:
        beside = [_same_part(folder, inside.name, data_path) for folder in (labels, second)]
        return Places(inside, beside[0] or labels, beside[1])
    names_file = _listed_by(wanted, split, root)
    divided = any(_folder_of(root, SPLIT_FOLDERS[one]) for one in LISTS) or any(
        _folder_of(images, SPLIT_FOLDERS[one]) or _find_list(root, one) for one in LISTS
    )
    if names_file is None and (divided or not undivided):
        folders = " or ".join(SPLIT_FOLDERS[split])
        raise DataError(
            f"--data_path {data_path!r} has no {split} pictures: {images} has no folder {folders}, "
            f"and {root} no list {' or '.join(f'{name}.txt' for name in LISTS[split])}; give a "
            f"text file of names as --{split}_list"
        )
    return Places(images, labels, second, names_file)


def _folder_of(parent: Path, names: Iterable[str]) -> Path | None:
    """The first folder in `parent` that has one of the names, in any case."""
    there = {path.name.casefold(): path for path in sorted(parent.iterdir()) if path.is_dir()}
    for name in names:
        exact = parent / Path(name).expanduser()
        if exact.is_dir():
            return exact
        if name.casefold() in there:
            return there[name.casefold()]
    return None


def _needed(base: Path, names: Sequence[str], what: str, option: str, data_path: str) -> Path:
    """The folder of that kind in `base`.

    Raises:
        DataError: there is none.
    """
    found = _folder_of(base, names)
    if found is not None:
        return found
    there = sorted(path.name for path in base.iterdir() if path.is_dir())
    listed = ", ".join(there[:20]) or "none"
    raise DataError(
        f"--data_path {data_path!r} has no {what}: looked in {base} for a folder "
        f"{' or '.join(names)}, found {listed}; give its name as --{option}"
    )


def _same_part(folder: Path | None, name: str, data_path: str) -> Path | None:
    """The folder of a split in `folder`.

    Raises:
        DataError: there is none.
    """
    if folder is None:
        return None
    found = _folder_of(folder, (name,))
    if found is None:
        raise DataError(
            f"--data_path {data_path!r}: the pictures lie in a folder {name}, but {folder} has "
            f"none of that name"
        )
    return found


def _listed_by(wanted: str | None, split: str, root: Path) -> Path | None:
    """The list of names of a split: the one asked for, else a usual one."""
    if wanted is None:
        return _find_list(root, split)
    for path in (Path(wanted).expanduser(), root / wanted):
        if path.is_file():
            return path
    raise DataError(
        f"--{split}_list {wanted!r} is no file, neither from here nor from {root}; expected a text "
        "file with the name of a picture in each line"
    )


def _find_list(root: Path, split: str) -> Path | None:
    """A list of a usual name.

    Raises:
        DataError: several of them.
    """
    for name in LISTS[split]:
        for place in LIST_PLACES:
            found = sorted(root.glob(place.format(name)))
            if len(found) > 1:
                named = ", ".join(str(path.relative_to(root)) for path in found)
                raise DataError(
                    f"{root} has several lists of {split} pictures: {named}; choose one by "
                    f"--{split}_list"
                )
            if found:
                return found[0]
    return None


# -- pairs ----------------------------------------------------------------------------------------


def find_files(places: Places, options: LabelMapConfig) -> Files:
    """The pictures of a split, and what belongs to each: files of the same name but the extension.

    Raises:
        DataError: a picture without label map or second picture, two files for one, or a name that
            is listed without a picture.
    """
    left_out = LeftOut(f"files in {places.images}")
    images = _by_name(
        find_pictures(places.images, extensions=READ, left_out=left_out), places.images
    )
    kinds = READ if options.binary_masks else READ - JPEG
    suffix = options.label_suffix or ""
    unread = LeftOut(f"files in {places.labels}")
    found = find_pictures(places.labels, "--label_folder", kinds, unread)
    labels = _by_name(found, places.labels, suffix)
    second = {}
    if places.second is not None:
        second = _by_name(find_pictures(places.second, extensions=READ), places.second)
    chosen = sorted(images) if places.names is None else _listed_names(places, images)
    _check_there(chosen, images, "pictures", places.images, str(places.names))
    belonging = f"{places.images}"
    hint = _jpeg_hint(unread) if not options.binary_masks else ""
    _check_there(chosen, labels, f"label maps{hint}", places.labels, belonging, suffix)
    if places.second is not None:
        _check_there(chosen, second, "second pictures", places.second, belonging)
    notes = [left_out] if left_out.total else []
    if places.names is None:
        for name in sorted(set(labels) - set(images)):
            unread.add("without a picture", labels[name][0].name)
    notes += [unread] if unread.total else []
    return Files(
        [images[name][0] for name in chosen],
        [labels[name][0] for name in chosen],
        [second[name][0] for name in chosen] if second else [],
        notes,
    )


def _by_name(paths: Iterable[Path], folder: Path, suffix: str = "") -> dict[str, list[Path]]:
    """The files by their names below `folder`, without extension and `suffix`."""
    found: dict[str, list[Path]] = {}
    for path in paths:
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name.endswith(suffix):
            found.setdefault(name.removesuffix(suffix), []).append(path)
    return found


def _check_there(
    names: Sequence[str],
    files: dict[str, list[Path]],
    what: str,
    folder: Path,
    wanted_by: str,
    suffix: str = "",
) -> None:
    """Raises `DataError` unless there is one file for each of the names."""
    missing = [name for name in names if name not in files]
    if missing:
        raise DataError(
            f"{len(missing):,} of {len(names):,} {what} are missing in {folder}, which "
            f"{wanted_by} needs: {_first([name + suffix for name in missing])}; expected a file of "
            "that name (the extension may be another) for each"
        )
    several = [name for name in names if len(files[name]) > 1]
    if several:
        twice = " and ".join(path.name for path in files[several[0]])
        raise DataError(
            f"{len(several):,} of {len(names):,} {what} are there more than once in {folder}: "
            f"{twice}; expected one file for each name"
        )


def _jpeg_hint(unread: LeftOut) -> str:
    """What to say where label maps were passed over for being JPEGs."""
    lossy = any(kind in JPEG for kind in unread.counts)
    return " (JPEG files are not read as such: they do not keep values)" if lossy else ""


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED_AT_MOST:,} more" if len(names) > NAMED_AT_MOST else ""
    return ", ".join(names[:NAMED_AT_MOST]) + more


def _listed_names(places: Places, there: AbstractSet[str] | dict[str, list[Path]]) -> list[str]:
    """The names in a list, without extensions; of a line of several columns the first.

    Raises:
        DataError: the list cannot be read, is empty, or names a picture twice.
    """
    assert places.names is not None
    try:
        lines = places.names.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{places.names} is no list of names: {error}") from error
    names = [_name_in(line.strip(), there) for line in lines if line.strip()]
    if not names:
        raise DataError(f"{places.names} names no picture; expected a name in each line")
    if len(set(names)) < len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise DataError(f"{places.names} names {twice} twice; expected each picture once")
    return names


def _name_in(line: str, there: AbstractSet[str] | dict[str, list[Path]]) -> str:
    """The picture that a line names; where there is none such, what the line would name."""
    candidates = []
    for text in (line, line.split()[0]):
        path = Path(text.lstrip("/"))
        bare = path.with_suffix("") if path.suffix.lower() in READ else path
        candidates += [bare.as_posix(), bare.name]
    return next((name for name in candidates if name in there), candidates[-2])
