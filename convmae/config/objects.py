"""The options of reading annotations of objects. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from convmae.config.checks import check_choice, check_number, check_text
from convmae.config.data import DataConfig
from convmae.config.errors import OptionError

LABEL_FORMATS = ("auto", "coco", "voc", "yolo")
SPLIT_MARK = "{split}"


@dataclass(frozen=True)
class ObjectOptions:
    """Where the annotations and pictures of a split lie; `ObjectConfig` explains the fields."""

    label_format: str = "auto"
    annotations: str | None = None
    image_folder: str | None = None
    second_images: str | None = None
    second_chans: int = 1
    list_file: str | None = None
    class_names: str | None = None


@dataclass(kw_only=True)
class ObjectConfig(DataConfig):
    """Where annotations and pictures lie.

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
    image_folder: str | None = None
    """Below --data_path the folder of the pictures, {split} as above."""
    second_images: str | None = None
    """Below --data_path the folder of a second picture for each, such as the infrared one, with the
    same names: its channels are stacked after those of the first. {split} as above."""
    second_chans: int | None = None
    """Channels of a second picture; by default 1, which reads 8-bit pictures as grey."""
    train_list: str | None = None
    """A text file below --data_path of the names of the pictures to train on, one a line, with or
    without their ending; by default all that are annotated, or what the layout says."""
    val_list: str | None = None
    """The same of the pictures to evaluate on."""
    class_names: str | None = None
    """A file with the names of the classes: a text file with one in each line, or a YAML file with
    names, such as YOLO's data.yaml. YOLO's text files need it, as they have numbers alone."""

    def object_options(self, split: str) -> ObjectOptions:
        """These options for `train` or `val`, as one value."""
        return ObjectOptions(
            self.label_format,
            self.annotations,
            self.image_folder,
            self.second_images,
            1 if self.second_chans is None else self.second_chans,
            self.train_list if split == "train" else self.val_list,
            self.class_names,
        )

    def check_objects(self, both: bool) -> None:
        """Raises `OptionError` where one of these options has a value that cannot work.

        Args:
            both: whether train and val are both read, and so must differ.
        """
        check_choice("label_format", self.label_format, LABEL_FORMATS)
        for name in (
            *("annotations", "image_folder", "second_images"),
            *("train_list", "val_list", "class_names"),
        ):
            if getattr(self, name) is not None:
                check_text(name, getattr(self, name))
        if self.second_chans is not None:
            check_number("second_chans", self.second_chans, whole=True, above=0)
            if self.second_images is None:
                raise OptionError(
                    f"--second_chans {self.second_chans} has no effect without --second_images; "
                    "leave it out"
                )
        same = self.annotations is not None and SPLIT_MARK not in self.annotations
        if both and same and None in (self.train_list, self.val_list):
            raise OptionError(
                f"--annotations {self.annotations!r} is the same for train and val; write "
                f"{SPLIT_MARK} where the name of the split stands, as in "
                f"annotations/{SPLIT_MARK}.json, or give --train_list and --val_list"
            )
