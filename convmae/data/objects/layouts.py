"""Where annotations and pictures of a data set lie: what options say, or a layout that is known."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convmae.config.objects import SPLIT_MARK
from convmae.data.classes import name_problem
from convmae.data.errors import DataError
from convmae.data.folder import find_pictures

if TYPE_CHECKING:
    from convmae.config.objects import ObjectOptions

# Names of a split in the folders and files of different data sets, the first that is there counts.
SPLIT_NAMES = {"train": ("train",), "val": ("val", "valid", "test")}
LARGEST_YAML = 2**20  # characters that are read
ROBOFLOW = "_annotations.coco.json"
KNOWN = (
    "annotations/instances_train*.json (COCO), train/_annotations.coco.json, Annotations with "
    "JPEGImages and ImageSets (Pascal VOC), a data.yaml or images/train with labels/train (YOLO), "
    "Annotation or labels with Vis or vi, Ir or ir (M3FD)"
)


@dataclass(frozen=True)
class Layout:
    """Where the annotations and pictures of a split lie.

    Attributes:
        label_format: `coco`, `voc` or `yolo`.
        annotations: a JSON file, or a folder of XML or text files.
        images: folders of pictures, one or two, whose channels are stacked.
        stems: names of the pictures of the split without ending; None for all.
        classes: their names, where the layout or an option tells them.
        undivided: the layout itself knows no splits.
    """

    label_format: str
    annotations: Path
    images: tuple[Path, ...]
    stems: tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None
    undivided: bool = False


def find_layout(data_path: str, split: str, options: ObjectOptions) -> Layout:
    """The layout of a split.

    Args:
        data_path: a folder, or a YAML file as Ultralytics' YOLO has.
        split: `train` or `val`.
        options: what was asked for; the rest is looked for.

    Raises:
        DataError: nothing that is known lies there, or what was asked for does not.
    """
    root = Path(data_path).expanduser()
    if not root.exists():
        raise DataError(f"--data_path {data_path!r} does not exist; expected a folder with {KNOWN}")
    classes = None
    if options.class_names is not None:
        classes = read_class_names(_below(root, options.class_names, split, "class_names"))
    if root.is_file() and root.suffix.lower() not in (".yaml", ".yml"):
        raise DataError(
            f"--data_path {data_path!r} is a file; expected a folder (a JSON file is given by "
            "--annotations), or YOLO's data.yaml"
        )
    found = None if options.annotations is not None else _known(root, split, options)
    if found is None and options.annotations is None:
        raise DataError(
            f"--data_path {data_path!r} has no {split} annotations in a layout that is known: "
            f"{KNOWN}; or say by --annotations and --image_folder where they are"
        )
    annotations = (
        found.annotations
        if found is not None
        else _below(root, str(options.annotations), split, "annotations")
    )
    label_format = options.label_format
    if label_format == "auto":
        label_format = found.label_format if found is not None else _format_of(annotations)
    if (label_format == "coco") == annotations.is_dir():
        kinds = {"coco": "a JSON file", "voc": "a folder of XML files", "yolo": "of text files"}
        what = "a folder" if annotations.is_dir() else "a file"
        raise DataError(
            f"--label_format {label_format}: {annotations} is {what}; expected "
            f"{kinds[label_format]}"
        )
    images = found.images if found is not None else ()
    if options.image_folder is not None:
        images = (_below(root, options.image_folder, split, "image_folder"),)
    if not images:
        images = (annotations.parent if annotations.is_file() else root,)
    if options.second_images is not None:
        images = (images[0], _below(root, options.second_images, split, "second_images"))
    stems = found.stems if found is not None else None
    if options.list_file is not None:
        stems = read_stems(_below(root, options.list_file, split, f"{split}_list"))
    if found is not None and found.undivided and stems is None:
        raise DataError(
            f"--data_path {data_path!r} has no list of the {split} pictures (looked for "
            f"meta/{split}.txt and {split}.txt); give a file of their names by --{split}_list"
        )
    if classes is None and found is not None:
        classes = found.classes
    return Layout(label_format, annotations, images, stems, classes)


def _below(root: Path, pattern: str, split: str, option: str) -> Path:
    """What an option names below the folder of the data, for a split.

    Raises:
        DataError: there is no such file or folder.
    """
    base = root if root.is_dir() else root.parent
    tried = []
    for name in SPLIT_NAMES[split] if SPLIT_MARK in pattern else ("",):
        path = base / Path(pattern.replace(SPLIT_MARK, name)).expanduser()
        if path.exists():
            return path
        tried.append(str(path))
    raise DataError(f"--{option} {pattern!r}: there is no {' and no '.join(tried)}")


def _format_of(annotations: Path) -> str:
    if annotations.is_file():
        return "coco"
    for entry in sorted(annotations.iterdir()):
        kinds = {".xml": "voc", ".txt": "yolo"}
        if entry.suffix.lower() in kinds:
            return kinds[entry.suffix.lower()]
    raise DataError(
        f"--annotations: {annotations} has neither .xml files (VOC) nor .txt files (YOLO); "
        "expected one of them, or a JSON file (COCO)"
    )


# -- layouts that are known -----------------------------------------------------------------------


def _known(root: Path, split: str, options: ObjectOptions) -> Layout | None:
    if root.is_file():
        return _of_yaml(root, split)
    for finder in (_coco, _roboflow, _yaml_inside, _voc, _m3fd, _tardal, _yolo_folders):
        found = finder(root, split)
        if found is not None and options.label_format in ("auto", found.label_format):
            return found
    return None


def _coco(root: Path, split: str) -> Layout | None:
    """`annotations/instances_train2017.json` with `train2017` or `images/train2017`."""
    for name in SPLIT_NAMES[split]:
        files = sorted((root / "annotations").glob(f"instances_{name}*.json"))
        if len(files) > 1:
            raise DataError(
                f"{root / 'annotations'} has {len(files)} files for {name}: "
                f"{', '.join(file.name for file in files[:5])}; choose one by --annotations"
            )
        for file in files:
            set_name = file.stem.removeprefix("instances_")
            for folder in (root / set_name, root / "images" / set_name, root / "images", root):
                if folder.is_dir():
                    return Layout("coco", file, (folder,))
    return None


def _roboflow(root: Path, split: str) -> Layout | None:
    """`train/_annotations.coco.json` beside its pictures."""
    for name in SPLIT_NAMES[split]:
        if (root / name / ROBOFLOW).is_file():
            return Layout("coco", root / name / ROBOFLOW, (root / name,))
    return None


def _voc(root: Path, split: str) -> Layout | None:
    """`Annotations`, `JPEGImages`, `ImageSets/Main/train.txt`."""
    if not ((root / "Annotations").is_dir() and (root / "JPEGImages").is_dir()):
        return None
    for name in SPLIT_NAMES[split]:
        file = root / "ImageSets" / "Main" / f"{name}.txt"
        if file.is_file():
            images = (root / "JPEGImages",)
            return Layout("voc", root / "Annotations", images, read_stems(file))
    raise DataError(
        f"{root / 'ImageSets' / 'Main'} has no list of the {split} pictures (looked for "
        f"{', '.join(f'{name}.txt' for name in SPLIT_NAMES[split])}); name one by --{split}_list"
    )


def _m3fd(root: Path, split: str) -> Layout | None:
    """`Annotation/00001.xml` for `Vis/00001.png` and `Ir/00001.png`; the split is no part of it."""
    if not (root / "Annotation").is_dir():
        return None
    folders = [root / name for name in ("Vis", "Ir") if (root / name).is_dir()]
    if not folders:
        return None
    stems = _listed_beside(root, split)
    return Layout("voc", root / "Annotation", (folders[0],), stems, undivided=True)


def _tardal(root: Path, split: str) -> Layout | None:
    """`labels/00001.txt` for `vi/00001.png` and `ir/00001.png`, and `meta/train.txt`."""
    folders = [root / name for name in ("vi", "ir") if (root / name).is_dir()]
    if not (root / "labels").is_dir() or not folders:
        return None
    stems = _listed_beside(root, split)
    return Layout("yolo", root / "labels", (folders[0],), stems, undivided=True)


def _listed_beside(root: Path, split: str) -> tuple[str, ...] | None:
    """The list of a split in `meta` or in the folder itself; None where there is none."""
    for name in SPLIT_NAMES[split]:
        for file in (root / "meta" / f"{name}.txt", root / f"{name}.txt"):
            if file.is_file():
                return read_stems(file)
    return None


def _yolo_folders(root: Path, split: str) -> Layout | None:
    """`images/train` and `labels/train`, or `train/images` and `train/labels`."""
    for name in SPLIT_NAMES[split]:
        for images, labels in (
            (root / "images" / name, root / "labels" / name),
            (root / name / "images", root / name / "labels"),
        ):
            if images.is_dir() and labels.is_dir():
                return Layout("yolo", labels, (images,))
    return None


def _yaml_inside(root: Path, split: str) -> Layout | None:
    files = [root / name for name in ("data.yaml", "dataset.yaml", "data.yml")]
    return next((_of_yaml(file, split) for file in files if file.is_file()), None)


def _of_yaml(file: Path, split: str) -> Layout:
    """A data set of Ultralytics' YOLO: `path`, `train`, `val`, `names`.

    Raises:
        DataError: it is none, or what it names is not there.
    """
    values = _yaml(file)
    place = next((values[name] for name in SPLIT_NAMES[split] if values.get(name)), None)
    if not isinstance(place, str):
        found = "none" if place is None else repr(place)
        raise DataError(
            f"{file} must name one folder or list of the {split} pictures (keys "
            f"{', '.join(SPLIT_NAMES[split])}), got {found}"
        )
    base = file.parent / Path(str(values.get("path") or ".")).expanduser()
    bases = (base, file.parent, file.parent / "..")  # Roboflow's paths begin one folder too deep
    target = next((each / place for each in bases if (each / place).exists()), None)
    if target is None and place.startswith("../"):
        inside = file.parent / place.removeprefix("../")
        target = inside if inside.exists() else None
    if target is None:
        raise DataError(f"{file}: there is no {base / place}, its {split} pictures")
    classes = _names_of(values, file)
    stems: tuple[str, ...] | None = None
    folder = target
    if target.is_file():
        listed = [Path(line) for line in _lines(target)]
        parts = listed[0].parts if listed else ()
        if "images" not in parts:
            raise DataError(
                f"{target}: expected paths with a folder images in them, got {listed[:1]}"
            )
        depth = parts.index("images") + 1
        folder = target.parent.joinpath(*parts[:depth])
        if any(path.parts[:depth] != parts[:depth] for path in listed):
            raise DataError(f"{target} lists pictures of several folders images; expected one")
        stems = tuple(Path(*path.parts[depth:]).with_suffix("").as_posix() for path in listed)
    parts = folder.parts
    if "images" not in parts:
        raise DataError(
            f"{file}: the {split} pictures lie in {folder}; expected a folder images in its path, "
            "beside which labels lies"
        )
    place_of = len(parts) - 1 - parts[::-1].index("images")
    labels = Path(*parts[:place_of], "labels", *parts[place_of + 1 :])
    if not labels.is_dir():
        raise DataError(f"{file}: there is no folder {labels} with the boxes of {folder}")
    return Layout("yolo", labels, (folder,), stems, classes)


# -- small files ----------------------------------------------------------------------------------


def read_class_names(file: Path) -> tuple[str, ...]:
    """The names of classes in a text file, one in each line, or in a YAML file with `names`.

    Raises:
        DataError: there is none, or two are the same.
    """
    if file.suffix.lower() in (".yaml", ".yml"):
        return _names_of(_yaml(file), file)
    return _checked(tuple(_lines(file)), file)


def _names_of(values: dict[str, Any], file: Path) -> tuple[str, ...]:
    names = values.get("names")
    if isinstance(names, dict):
        numbers = sorted(names, key=lambda key: (not isinstance(key, int), str(key).zfill(9)))
        if numbers != list(range(len(numbers))):
            raise DataError(
                f"{file}: names must have the numbers 0 to {len(numbers) - 1}, got {numbers[:10]}"
            )
        names = [names[number] for number in numbers]
    if not isinstance(names, list):
        raise DataError(
            f"{file} has no names of classes; expected names: [first, second] or names with 0: "
            "first, 1: second"
        )
    return _checked(tuple(str(name) for name in names), file)


def _checked(names: tuple[str, ...], file: Path) -> tuple[str, ...]:
    problem = name_problem(names) if names else "it has no name"
    if problem is not None:
        raise DataError(f"{file} does not tell classes apart: {problem}")
    return names


def read_stems(file: Path) -> tuple[str, ...]:
    """The names in a list of pictures, without ending; of VOC's lists the first column.

    Raises:
        DataError: it names none, or one twice.
    """
    stems = tuple(_stem(line) for line in _lines(file))
    if not stems:
        raise DataError(f"{file} names no picture; expected one in each line")
    twice = [stem for stem, count in Counter(stems).items() if count > 1]
    if twice:
        raise DataError(
            f"{file} names {len(twice):,} pictures more than once ({', '.join(twice[:5])}); "
            "expected each once"
        )
    return stems


def _stem(line: str) -> str:
    name = line.split()[0]
    return name if "." not in name else Path(name).with_suffix("").as_posix()


def picture_names(folder: Path) -> dict[str, str]:
    """The pictures of a folder by their names without ending, both below the folder.

    Raises:
        DataError: there is no picture, or two differ by the ending alone.
    """
    found: dict[str, str] = {}
    double = []
    for path in find_pictures(folder):
        name = path.relative_to(folder)
        stem = name.with_suffix("").as_posix()
        if stem in found:
            double.append(f"{found[stem]} and {name.as_posix()}")
        found[stem] = name.as_posix()
    if double:
        raise DataError(
            f"{folder}: {len(double):,} pictures differ from another by their ending alone "
            f"({'; '.join(double[:5])}); expected one picture for each file of annotations"
        )
    return found


def _lines(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as text: {error}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _yaml(file: Path) -> dict[str, Any]:
    import yaml

    try:
        with file.open(encoding="utf-8-sig") as opened:
            values = yaml.safe_load(opened.read(LARGEST_YAML))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise DataError(f"{file} must hold keys and values, found {type(values).__name__}")
    return values
