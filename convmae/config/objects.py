"""The options of reading annotations of objects. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from convmae.config.checks import check_choice, check_number, check_text
from convmae.config.data import DataConfig
from convmae.config.errors import OptionError

LABEL_FORMATS = ("auto", "coco", "voc", "yolo")
SPLIT_MARK = "{split}"
CHANNELS = re.compile(r"(.+):(\d+)")  # of a folder, after its name


@dataclass(frozen=True)
class ObjectOptions:
    """Where the annotations and pictures of a data set lie; the fields are those of `ObjectConfig`.

    Attributes:
        images: folders, each with the channels that its pictures are read with, if that is given.
    """

    label_format: str = "auto"
    annotations: str | None = None
    images: tuple[tuple[str, int | None], ...] = ()
    list_file: str | None = None
    class_names: str | None = None


@dataclass(kw_only=True)
class ObjectConfig(DataConfig):
    """How pictures with objects are read.

    Known layouts of --data_path need none of these options: COCO's (annotations/instances_*.json),
    Roboflow's (_annotations.coco.json in train and valid), Pascal VOC's, YOLO's (a data.yaml, or
    images and labels) and those of M3FD.
    """

    label_format: Literal["auto", "coco", "voc", "yolo"] = "auto"
    """What the annotations are: COCO's JSON, VOC's XML files or YOLO's text files; auto tells by
    what lies there."""
    annotations: str | None = None
    """Below --data_path the JSON file, or the folder of XML or text files. {split} stands for train
    and for val (or valid, or test): annotations/{split}.json."""
    images: tuple[str, ...] | None = None
    """Below --data_path the folder of the pictures, {split} as above. Of several, pictures of the
    same name are stacked, as RGB and infrared; Ir:1 reads those of the folder Ir with 1 channel."""
    list_file: str | None = None
    """Below --data_path a file with the name of a picture in each line, with or without ending,
    {split} as above: the pictures of the split. All that are annotated if not given."""
    class_names: str | None = None
    """A file with the names of the classes: a text file with one in each line, or a YAML file with
    names, such as YOLO's data.yaml. YOLO's text files need it, as they have numbers alone."""

    @property
    def objects(self) -> ObjectOptions:
        """These options as one value."""
        folders: list[tuple[str, int | None]] = []
        for text in self.images or ():
            found = CHANNELS.fullmatch(text)
            folders.append((found[1], int(found[2])) if found else (text, None))
        return ObjectOptions(
            self.label_format,
            self.annotations,
            tuple(folders),
            self.list_file,
            self.class_names,
        )

    def check_objects(self, splits: bool) -> None:
        """Raises `OptionError` where one of these options has a value that cannot work.

        Args:
            splits: whether train and val are both read, and so must differ.
        """
        check_choice("label_format", self.label_format, LABEL_FORMATS)
        for name in ("annotations", "list_file", "class_names"):
            if getattr(self, name) is not None:
                check_text(name, getattr(self, name))
        for folder, channels in self.objects.images:
            check_text("images", folder)
            if channels is not None:
                check_number("images", channels, whole=True, at_least=1)
        given = {"annotations": self.annotations, "list_file": self.list_file}
        marked = [value for value in given.values() if value is not None and SPLIT_MARK in value]
        if splits and any(given.values()) and not marked:
            name, value = next((n, v) for n, v in given.items() if v is not None)
            raise OptionError(
                f"--{name} {value!r} is the same for train and val; write {SPLIT_MARK} where the "
                f"name of the split stands, as in annotations/{SPLIT_MARK}.json"
            )
