"""The options of label maps: where they lie and what their values mean. Imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from convmae.config.checks import check_number, check_text, config_from_mapping
from convmae.config.errors import OptionError

IGNORED = 255  # in label maps as batches have them: the pixel counts for nothing
MOST_LABEL_CLASSES = IGNORED


@dataclass(kw_only=True)
class LabelMapConfig:
    """Where label maps lie and what their values mean.

    None is the default, or what the run of a checkpoint was told.
    """

    image_folder: str | None = None
    """Name of the folder of the pictures: below --data_path, or below train and val there. By
    default images, JPEGImages, vi, RGB or another usual name, whichever is there."""
    label_folder: str | None = None
    """Name of the folder of the label maps, beside that of the pictures; by default masks, labels,
    annotations, SegmentationClass or another usual name, whichever is there."""
    label_suffix: str | None = None
    """What the name of a label map has behind that of its picture, such as _mask."""
    second_images: str | None = None
    """Name of the folder of a second picture for each, such as the infrared one: its channels are
    stacked after those of the first."""
    second_chans: int | None = None
    """Channels of a second picture; by default 1, which reads 8-bit pictures as grey."""
    train_list: str | None = None
    """A text file of the names of the pictures to train on, one a line, with or without their
    extension; by default train.txt and the like, where there are no folders train and val."""
    val_list: str | None = None
    """The same of the pictures to evaluate on; by default val.txt or test.txt and the like."""
    class_names: str | None = None
    """A text file of the names of the classes, one a line, from class 0 on."""
    palette: str | None = None
    """A text file of colours, one a line, from class 0 on: red, green and blue (0 to 255), or
    #rrggbb, then the name of the class if it has one; "ignore" names what counts for nothing. Label
    maps are then pictures in these colours."""
    binary_masks: bool | None = None
    """Label maps are masks: values above 127 are class 1, the target; others class 0, the
    background."""
    reduce_zero_label: bool | None = None
    """0 in a label map counts for nothing, and class k is stored as k + 1 (ADE20K)."""
    ignore_label: int | None = None
    """The value in label maps that counts for nothing; 255 by default."""
    nb_classes: int | None = None
    """Classes; by default those of --class_names or --palette, else the largest label + 1."""

    def check_label_maps(self) -> None:
        """Raises `OptionError` where an option of label maps has a value that cannot work."""
        for field in dataclasses.fields(LabelMapConfig):
            value = getattr(self, field.name)
            if isinstance(value, str):
                check_text(field.name, value)
        if self.second_chans is not None:
            check_number("second_chans", self.second_chans, whole=True, above=0)
            if self.second_images is None:
                raise OptionError(
                    f"--second_chans {self.second_chans} has no effect without --second_images; "
                    "leave it out"
                )
        if self.ignore_label is not None:
            check_number("ignore_label", self.ignore_label, whole=True)
        if self.nb_classes is not None:
            limits = {"at_least": 2, "at_most": MOST_LABEL_CLASSES}
            check_number("nb_classes", self.nb_classes, whole=True, **limits)
        given = [name for name in ("palette", "binary_masks") if getattr(self, name)]
        given += [
            name for name in ("reduce_zero_label", "ignore_label") if given and self._has(name)
        ]
        if len(given) > 1:
            raise OptionError(
                f"--{given[1]} means nothing beside --{given[0]}, which says what every value of a "
                "label map means; give one of the two"
            )
        if self.binary_masks and self.nb_classes not in (None, 2):
            raise OptionError(
                f"--binary_masks have 2 classes, background and target, but --nb_classes is "
                f"{self.nb_classes}; leave it out"
            )

    def _has(self, name: str) -> bool:
        return getattr(self, name) not in (None, False)

    def label_options(self) -> dict[str, Any]:
        """The options of label maps that are given."""
        names = [field.name for field in dataclasses.fields(LabelMapConfig)]
        return {n: getattr(self, n) for n in names if getattr(self, n) is not None}

    def label_maps_over(self, learnt: dict[str, Any]) -> LabelMapConfig:
        """These options, and for those not given what the run of a checkpoint was told.

        Args:
            learnt: options of that run. Those of other things than label maps are passed over, and
                those of its own data: lists, and classes, which the checkpoint has itself.
        """
        own_data = {"nb_classes", "class_names", "train_list", "val_list"}
        names = {field.name for field in dataclasses.fields(LabelMapConfig)} - own_data
        before = {name: value for name, value in learnt.items() if name in names}
        own = self.label_options()
        if {"palette", "binary_masks", "reduce_zero_label", "ignore_label"} & set(own):
            for name in ("palette", "binary_masks", "reduce_zero_label", "ignore_label"):
                before.pop(name, None)  # they say together what values mean
        options = config_from_mapping(LabelMapConfig, before | own)
        options.check_label_maps()
        return options
