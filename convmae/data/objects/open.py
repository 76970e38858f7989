"""Opens pictures with objects: annotations read and checked, every file looked for, before use."""

from __future__ import annotations

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convmae.config.data import ReadOptions
from convmae.config.objects import ObjectOptions
from convmae.data.errors import DataError, Failure, UnreadableError, check_share
from convmae.data.fingerprint import file_entries
from convmae.data.folder import even_sample, find_pictures
from convmae.data.formats.decode import EncodedPicture
from convmae.data.label_maps.pairs import StackedPhotos
from convmae.data.loader import default_workers
from convmae.data.objects.coco import read_coco
from convmae.data.objects.layouts import Layout, find_layout, picture_names
from convmae.data.objects.voc import read_voc
from convmae.data.objects.yolo import read_yolo
from convmae.data.open import open_files
from convmae.data.picture import NO_LABEL
from convmae.data.source import PhotoSource, choose_balanced

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from convmae.data.crops import PickBox, Size
    from convmae.data.objects.annotations import Annotations, ObjectPicture
    from convmae.data.picture import Photos

AS_USUAL = ReadOptions()
NAMED_AT_MOST = 5


class ObjectPhotos:
    """`photos`, with the objects of each as its target.

    Args:
        photos: the pictures.
        pictures: what is annotated of each.
    """

    def __init__(self, photos: Photos, pictures: list[ObjectPicture]) -> None:
        self.photos, self.pictures = photos, pictures

    @property
    def channels(self) -> int:
        return self.photos.channels

    @property
    def dtype(self) -> torch.dtype:
        return self.photos.dtype

    def __len__(self) -> int:
        return len(self.pictures)

    def name(self, index: int) -> str:
        return self.photos.name(index)

    def label(self, index: int) -> int:
        return NO_LABEL

    def load(self, index: int) -> Tensor:
        """The whole picture, `[C, h, w]`.

        Raises:
            UnreadableError: it cannot be decoded, or is not as large as its annotation says.
        """
        image = self.photos.load(index)
        found, told = tuple(image.shape[-2:]), tuple(self.pictures[index].size)
        if found != told:
            raise UnreadableError(_other_size(found, told))
        return image

    def measured(self, index: int) -> Tensor:
        return self.photos.measured(index)

    def crop(self, index: int, pick: PickBox, size: Size) -> Tensor:
        return self.photos.crop(index, pick, size)

    def target(self, index: int) -> ObjectPicture:
        return self.pictures[index]


class ObjectSource(PhotoSource):
    """Pictures by index, each with its objects.

    Attributes:
        annotations: of all pictures, in their order.
    """

    def __init__(self, photos: Photos, annotations: Annotations, **about: Any) -> None:
        super().__init__(photos, classes=annotations.classes, **about)
        self.annotations = annotations


def open_objects(
    data_path: str,
    split: str,
    options: ObjectOptions,
    reading: ReadOptions = AS_USUAL,
    max_unreadable: float = 0.1,
    max_samples: int | None = None,
    seed: int = 0,
    masks: bool = False,
    keep_empty: bool = True,
) -> ObjectSource:
    """The pictures of a split with their objects, all of it checked.

    Args:
        data_path: the folder of the data, or YOLO's data.yaml.
        split: `train` or `val`.
        options: where annotations and pictures lie, and in which form.
        reading: how pictures are read. With several folders `in_chans` is of all together.
        max_unreadable: share of pictures that may be missing or unreadable.
        max_samples: of the pictures, this many, chosen by `seed`.
        seed: of that choice.
        masks: objects without a mask are left out.
        keep_empty: keep pictures without an object to learn from.

    Raises:
        DataError: something lacks or is wrong; the message says what, where and how often.
    """
    layout = find_layout(data_path, split, options)
    folders = _readings(layout, options, reading)
    annotations, missing = read_annotations(layout, folders[0])
    total = len(annotations.pictures) + len(missing)
    paths = _paths(layout, annotations, missing)
    check_share(missing, total, max_unreadable, "annotated pictures")
    unnamed = _unnamed(layout, annotations, missing)
    if unnamed and not _shares_folder(data_path, split, options, layout):
        annotations.notes.append(unnamed)
    _check_sizes(annotations, paths[0], folders[0])
    if masks:
        annotations.drop_without_masks()
        if not annotations.has_masks:
            raise DataError(
                f"{annotations.where} has boxes alone, no masks; --no_masks learns boxes alone"
            )
    empty = [place for place, p in enumerate(annotations.pictures) if not p.learned]
    if empty and not keep_empty:
        kept = sorted(set(range(len(annotations.pictures))) - set(empty))
        annotations.pictures = [annotations.pictures[place] for place in kept]
        paths = [[files[place] for place in kept] for files in paths]
        annotations.notes.append(
            f"{len(empty):,} of {len(empty) + len(kept):,} pictures have no object to learn from "
            "and are left out; --keep_empty keeps them"
        )
    photos, failures, description, notes = _photos(paths, layout, folders, max_unreadable)
    if reading.in_chans not in (None, photos.channels):
        raise DataError(
            f"--in_chans {reading.in_chans}: the pictures of "
            f"{' and '.join(map(str, layout.images))} have {photos.channels} channels"
        )
    objects = ObjectPhotos(photos, annotations.pictures)
    description += f", {annotations.objects:,} objects of {len(annotations.classes)} classes"
    chosen: Photos = objects
    if max_samples is not None:
        broken = {failure.name for failure in failures}
        chosen = choose_balanced(objects, max_samples, seed, broken)
        description += f"; {max_samples} of them chosen"
    source = ObjectSource(
        chosen,
        annotations,
        description="; ".join([description, *notes]),
        workers=default_workers(),
        failures=list(failures) if max_samples is None else [],
        max_unreadable=max_unreadable,
        root=os.path.join(layout.images[0], ""),
    )
    source.notes = [
        *annotations.told(),
        *(f"left out: {failure.name}: {failure.reason}" for failure in missing[:NAMED_AT_MOST]),
    ]
    if len(missing) > NAMED_AT_MOST:
        source.notes.append(f"left out: {len(missing) - NAMED_AT_MOST:,} more annotated pictures")
    source.entries = lambda: _entries(layout, annotations, paths)
    return source


def open_pairs(
    data_path: str,
    image_folder: str | None,
    second_images: str | None,
    second_chans: int,
    reading: ReadOptions = AS_USUAL,
    max_unreadable: float = 0.1,
) -> PhotoSource:
    """Pictures below a folder, with those of a second folder stacked; nothing annotated.

    Args:
        data_path: the folder that has both.
        image_folder, second_images: below it; itself, and none, if not given.
        second_chans: channels of a second picture.
        reading: how pictures are read; with two folders `in_chans` is of both together.
        max_unreadable: share of pictures that may be missing or unreadable.

    Raises:
        DataError: no pictures, or too many that have no partner.
    """
    options = ObjectOptions("auto", None, image_folder, second_images, second_chans)
    root = Path(data_path).expanduser()
    folders = [root / (image_folder or ".")]
    folders += [root / second_images] if second_images is not None else []
    layout = Layout("auto", root, tuple(folders))
    names = [picture_names(folder) for folder in folders]
    missing = [
        Failure(name, f"there is no picture {stem} in {folders[-1]}")
        for stem, name in names[0].items()
        if stem not in names[-1]
    ]
    check_share(missing, len(names[0]), max_unreadable)
    stems = [stem for stem in names[0] if stem in names[-1]]
    paths = [[folder / each[s] for s in stems] for folder, each in zip(folders, names)]
    readings = _readings(layout, options, reading)
    photos, failures, description, notes = _photos(paths, layout, readings, max_unreadable)
    source = PhotoSource(
        photos,
        description="; ".join([description, *notes]),
        workers=default_workers(),
        failures=failures,
        max_unreadable=max_unreadable,
        root=os.path.join(folders[0], ""),
    )
    source.notes = [f"left out: {name}: {why}" for name, why in missing[:NAMED_AT_MOST]]
    return source


def _readings(layout: Layout, options: ObjectOptions, reading: ReadOptions) -> list[ReadOptions]:
    """How the pictures of each folder are read; with two `in_chans` is of both together."""
    if len(layout.images) == 1:
        return [reading]
    first = None if reading.in_chans is None else reading.in_chans - options.second_chans
    if first is not None and first < 1:
        raise DataError(
            f"--in_chans {reading.in_chans} must be more than --second_chans "
            f"{options.second_chans}: it is of both pictures together"
        )
    channels = (first, options.second_chans)
    return [dataclasses.replace(reading, in_chans=count) for count in channels]


# -- annotations ----------------------------------------------------------------------------------


def read_annotations(
    layout: Layout, reading: ReadOptions = AS_USUAL
) -> tuple[Annotations, list[Failure]]:
    """The annotations of a layout, and which pictures of theirs cannot be read.

    Args:
        layout: where they lie.
        reading: how the pictures are read whose headers tell their sizes.
    """
    if layout.label_format == "coco":
        annotations = read_coco(layout.annotations)
        if layout.classes is not None and list(layout.classes) != annotations.classes:
            raise DataError(
                f"--class_names: {layout.annotations} has classes {annotations.classes}, in the "
                f"order of their ids, but the file names {list(layout.classes)}; leave the option "
                "out"
            )
        if layout.stems is not None:
            _choose(annotations, layout.stems)
        return annotations, []
    folder = layout.images[0]
    pictures = picture_names(folder)
    stems = layout.stems
    if layout.label_format == "voc":
        if stems is None:
            stems = _stems_of(layout.annotations, ".xml")
        sizes = _Sizes(folder, reading)
        return read_voc(layout.annotations, stems, pictures, sizes, layout.classes)
    if layout.classes is None:
        raise DataError(
            f"{layout.annotations} has YOLO's text files, which hold numbers of classes without "
            "their names; give a file with the names by --class_names"
        )
    alone = _stems_of(layout.annotations, ".txt")
    if stems is None:
        stems = tuple(sorted({*pictures, *(stem for stem in alone if stem != "classes")}))
    sizes = _Sizes(folder, reading)
    sizes.read([pictures[stem] for stem in stems if stem in pictures])
    return read_yolo(layout.annotations, stems, pictures, sizes, layout.classes)


def _shares_folder(data_path: str, split: str, options: ObjectOptions, layout: Layout) -> bool:
    """Whether the pictures of the other split lie in the same folder as those of this one."""
    try:
        other = find_layout(data_path, "val" if split == "train" else "train", options)
    except DataError:
        return False
    return other.images == layout.images


def _unnamed(layout: Layout, annotations: Annotations, missing: list[Failure]) -> str | None:
    """What to tell of pictures that lie there and that no annotation names.

    Nothing where a list chooses the pictures, or of YOLO, whose pictures without a file of text are
    those without an object.
    """
    if layout.stems is not None or layout.label_format == "yolo":
        return None
    folder = layout.images[0]
    names = [picture.name for picture in annotations.pictures] + [one.name for one in missing]
    named = {os.path.normpath(folder / name) for name in names}
    lying = find_pictures(folder)
    unnamed = [path for path in lying if os.path.normpath(path) not in named]
    if not unnamed:
        return None
    return (
        f"{len(unnamed):,} of {len(lying):,} pictures in {folder} are named by no annotation of "
        f"{layout.annotations} and are not used, {min(unnamed).name} first"
    )


def _stems_of(folder: Path, ending: str) -> tuple[str, ...]:
    """The files of a folder, nested ones too, without their ending."""
    found = (path.relative_to(folder) for path in folder.rglob(f"*{ending}"))
    stems = sorted(path.with_suffix("").as_posix() for path in found)
    if not stems:
        raise DataError(f"{folder} has no {ending} file; expected one for each picture")
    return tuple(stems)


def _choose(annotations: Annotations, stems: tuple[str, ...]) -> None:
    """Keeps the pictures that a list names.

    Raises:
        DataError: one of them is not annotated.
    """
    by_stem = {Path(p.name).with_suffix("").as_posix(): p for p in annotations.pictures}
    unknown = [stem for stem in stems if stem not in by_stem]
    if unknown:
        raise DataError(
            f"{annotations.where} has no image of {len(unknown):,} of {len(stems):,} names of "
            f"--train_list or --val_list: {', '.join(unknown[:NAMED_AT_MOST])}"
        )
    annotations.pictures = [by_stem[stem] for stem in stems]


class _Sizes:
    """Height and width of pictures by their headers, each read once."""

    def __init__(self, folder: Path, reading: ReadOptions) -> None:
        self.folder, self.reading = folder, reading
        self.known: dict[str, Size | str] = {}

    def read(self, names: list[str]) -> None:
        """Reads the headers of many, several at a time."""
        with ThreadPoolExecutor(8) as pool:
            self.known.update(zip(names, pool.map(self._found, names)))

    def __call__(self, name: str) -> Size:
        if name not in self.known:
            self.known[name] = self._found(name)
        found = self.known[name]
        if isinstance(found, str):
            raise UnreadableError(found)
        return found

    def _found(self, name: str) -> Size | str:
        """The size, or why there is none."""
        try:
            return EncodedPicture(self.folder / name, self.reading).size()
        except UnreadableError as error:
            return str(error)


# -- pictures -------------------------------------------------------------------------------------


def _paths(layout: Layout, annotations: Annotations, missing: list[Failure]) -> list[list[Path]]:
    """The files of the pictures, a list for each folder; those that lack go into `missing`.

    Pictures of which a file lacks are taken out of the annotations.
    """
    first, *others = layout.images
    indices = [picture_names(folder) for folder in others]
    kept, paths = [], []
    for picture in annotations.pictures:
        stem = Path(picture.name).with_suffix("").as_posix()
        files: list[Path | None] = [first / picture.name]
        files += [
            folder / index[stem] if stem in index else None
            for folder, index in zip(others, indices)
        ]
        lacking = [
            f"there is no picture {stem} in {folder}"
            for file, folder in zip(files, layout.images)
            if file is None or not file.is_file()
        ]
        if lacking:
            missing.append(Failure(picture.name, lacking[0]))
        else:
            kept.append(picture)
            paths.append([file for file in files if file is not None])
    annotations.pictures = kept
    return [[files[place] for files in paths] for place in range(len(layout.images))]


def _check_sizes(annotations: Annotations, paths: list[Path], reading: ReadOptions) -> None:
    """Raises `DataError` where pictures are not as large as their annotations say.

    Of very many an even sample is looked at; the others are looked at when they are read.
    """
    told = dict(zip(paths, (picture.size for picture in annotations.pictures)))
    chosen = even_sample(paths)
    sizes = _Sizes(Path(), reading)
    sizes.read([str(path) for path in chosen])
    wrong = []
    for path in chosen:
        found = sizes.known[str(path)]
        if not isinstance(found, str) and tuple(found) != tuple(told[path]):
            wrong.append(f"{path}: {_other_size(found, told[path])}")
    if wrong:
        raise DataError(
            f"{len(wrong):,} of {len(chosen):,} pictures have another size than "
            f"{annotations.where} says: {'; '.join(wrong[:NAMED_AT_MOST])}. Expected boxes in "
            "pixels of the pictures that are there, upright"
        )


def _other_size(found: Any, told: Any) -> str:
    return (
        f"the picture has {found[0]} x {found[1]} pixels (height x width), its annotation says "
        f"{told[0]} x {told[1]}"
    )


def _photos(
    paths: list[list[Path]], layout: Layout, readings: list[ReadOptions], max_unreadable: float
) -> tuple[Photos, list[Failure], str, list[str]]:
    """The pictures, failures, a description, and what is done to them."""
    opened = [
        open_files(files, None, str(folder), max_unreadable, reading)
        for files, folder, reading in zip(paths, layout.images, readings)
    ]
    photos: Photos = opened[0][0]
    if len(opened) > 1:
        photos = StackedPhotos(opened[0][0], opened[1][0])
    failures = [failure for part in opened for failure in part[1]]
    description = " stacked with ".join(part[2] for part in opened)
    return photos, failures, description, [note for part in opened for note in part[3]]


def _entries(
    layout: Layout, annotations: Annotations, paths: list[list[Path]]
) -> list[tuple[str, str]]:
    """Names and sizes of all files, and what is annotated, for a fingerprint."""
    entries = [
        entry
        for files, folder in zip(paths, layout.images)
        for entry in file_entries(files, folder)
    ]
    return [*entries, (layout.annotations.name, _digest(annotations))]


def _digest(annotations: Annotations) -> str:
    """A number that differs where boxes, labels or shapes do."""
    from hashlib import sha256

    digest = sha256(repr(annotations.classes).encode())
    for picture in annotations.pictures:
        digest.update(repr((picture.name, picture.size, picture.shapes)).encode())
        for values in (picture.boxes, picture.labels, picture.crowd):
            digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()
