"""The classes of label maps: how many, their names, and whether the values fit them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from convmae.config.label_maps import IGNORED
from convmae.data.classes import ClassNames, ClassNumbers, counted, listed
from convmae.data.errors import DataError
from convmae.data.label_maps.layout import NAMED_AT_MOST
from convmae.data.label_maps.values import MASK_NAMES, read_class_names

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from convmae.config.label_maps import LabelMapConfig
    from convmae.data.label_maps.pairs import LabelSurvey
    from convmae.data.label_maps.values import LabelReading


def told_classes(options: LabelMapConfig, reading: LabelReading) -> ClassNames | None:
    """The classes that options name or count; None where the label maps alone tell them.

    Raises:
        DataError: the options contradict each other.
    """
    names: Sequence[str] | None = None
    source = "--class_names"
    if options.class_names is not None:
        names = read_class_names(options.class_names)
    elif reading.palette is not None and reading.palette.names is not None:
        names, source = reading.palette.names, "--palette"
    elif reading.binary:
        names, source = MASK_NAMES, "--binary_masks"
    fixed = None  # classes that there are whatever the label maps hold
    if reading.palette is not None:
        fixed = len(reading.palette.colours)
    elif reading.binary:
        fixed = len(MASK_NAMES)
    if names is not None and fixed not in (None, len(names)):
        of = "--palette" if reading.palette is not None else "--binary_masks"
        raise DataError(
            f"--class_names {options.class_names!r} names {counted(names)}, but {of} has {fixed}"
        )
    count = options.nb_classes or (fixed if names is None else len(names))
    if count is None:
        return None
    if names is not None and len(names) > count:
        raise DataError(
            f"--nb_classes {count} is fewer than the {counted(names)} of {source}: {listed(names)}"
        )
    if count > IGNORED:
        raise DataError(f"{source} has {count} classes; expected {IGNORED} at most")
    return ClassNumbers.of(count) if names is None else ClassNames.padded(names, count)


def classes_of_maps(
    told: ClassNames | None,
    surveys: Mapping[str, LabelSurvey],
    data: str,
    reading: LabelReading,
) -> tuple[ClassNames, list[str]]:
    """The classes to learn, and what to tell about them.

    Args:
        told: those that options or a checkpoint say; None for as many as the label maps have.
        surveys: of all label maps, by split.
        data: what to call them in messages.
        reading: what their values mean.

    Raises:
        DataError: values beyond the classes, masks that are read as class numbers, nothing but
            ignored pixels, or one class alone.
    """
    pixels = np.sum([survey.pixels for survey in surveys.values()], axis=0)
    _check_meaning(pixels, data, reading)
    there = np.flatnonzero(pixels[:IGNORED])
    classes = ClassNumbers.of(int(there[-1]) + 1) if told is None else told
    count = len(classes)
    if count < 2:
        raise DataError(
            f"the label maps of {data} hold class 0 alone; expected two classes at least"
        )
    for split, survey in surveys.items():
        check_largest(survey, count, f"{data} ({split})", reading)
    notes = [_shares(survey, classes, split) for split, survey in surveys.items()]
    absent = [classes[number] for number in range(count) if not pixels[number]]
    if absent:
        notes.append(f"note: no label map of {data} has a pixel of {listed(absent)}")
    return classes, notes


def check_largest(survey: LabelSurvey, count: int, data: str, reading: LabelReading) -> None:
    """Raises `DataError` where label maps have classes of which there are only `count`."""
    beyond = [
        f"{path} has {largest}"
        for largest, paths in sorted(survey.largest.items(), reverse=True)
        if largest >= count
        for path in paths
    ]
    if not beyond:
        return
    more = f" and {len(beyond) - NAMED_AT_MOST:,} more" if len(beyond) > NAMED_AT_MOST else ""
    reduced = " (after --reduce_zero_label)" if reading.reduce_zero else ""
    raise DataError(
        f"{len(beyond):,} of {survey.total:,} label maps of {data} have values beyond the {count} "
        f"classes{reduced}: {', '.join(beyond[:NAMED_AT_MOST])}{more}; expected 0 to {count - 1}, "
        f"or {reading.ignore} for what is ignored. --nb_classes, --class_names, --ignore_label and "
        "--reduce_zero_label say what values mean"
    )


def _check_meaning(pixels: np.ndarray, data: str, reading: LabelReading) -> None:
    """Raises `DataError` where label maps are most likely not what the options say."""
    if not pixels[:IGNORED].any():
        raise DataError(f"the label maps of {data} hold nothing but pixels that are ignored")
    plain = reading.palette is None and not reading.binary and not reading.reduce_zero
    if plain and reading.ignore == IGNORED and pixels[IGNORED] and not pixels[1:IGNORED].any():
        raise DataError(
            f"the label maps of {data} hold 0 and 255 alone, of which 255 would be ignored; give "
            "--binary_masks, if they are masks of a background and a target"
        )
    if reading.binary and not pixels[1]:
        raise DataError(
            f"no mask of {data} has a value above 127, which --binary_masks takes for the target; "
            "without it values are the numbers of classes, 0 and 1"
        )


def _shares(survey: LabelSurvey, classes: Sequence[str], split: str) -> str:
    """What part of the pixels each class has, the largest first, and what reading took."""
    pixels = survey.pixels
    known = max(1, int(pixels[:IGNORED].sum()))
    order = sorted(range(len(classes)), key=lambda number: -pixels[number])[:10]
    shares = ", ".join(f"{classes[n]} {100 * pixels[n] / known:.3g} %" for n in order)
    more = ", ..." if len(classes) > len(order) else ""
    ignored = 100 * pixels[IGNORED] / max(1, int(pixels.sum()))
    return (
        f"{survey.total:,} label maps ({split}) read and checked in {survey.seconds:.1f} s: "
        f"{shares}{more}; {ignored:.3g} % ignored"
    )
