"""Classes of a data set and of a model: which are learned, and which is which."""

from __future__ import annotations

from typing import TYPE_CHECKING

from convmae.config import OptionError
from convmae.config.classify import MOST_CLASSES
from convmae.data.classes import (
    ClassNames,
    ClassNumbers,
    case_notes,
    listed,
    match_classes,
    name_problem,
    shown_number,
)
from convmae.data.source import ExpectedLabels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convmae.data import Source


def check_labels(source: Source, option: str) -> None:
    """Raises `OptionError` unless the pictures of `option` have labels."""
    if source.classes is None and source.numbers is None:
        if source.no_classes:
            raise OptionError(f"{option}: {source.no_classes}")
        raise OptionError(
            f"{option} holds pictures without labels; expected class folders, IDX files with "
            "labels, or shards with .cls members"
        )


def classes_to_learn(
    source: Source, nb_classes: int | None, option: str
) -> tuple[ClassNames, list[str]]:
    """The classes that a model learns from `source`, whose labels are theirs from now on.

    Args:
        source: pictures of training.
        nb_classes: how many the model is to have; None for those of the pictures.
        option: what to call the pictures in messages.

    Returns:
        The names, and what to tell about them.

    Raises:
        OptionError: no labels, nothing that tells how many classes there are, fewer `nb_classes`
            than there are, one class alone, two of one name, or a class folder without pictures.
    """
    check_labels(source, option)
    if source.empty_classes:
        raise OptionError(
            f"{option} has class folders that hold no picture to train on: "
            f"{listed(source.empty_classes)}; expected pictures of every class: add some, or "
            "remove the folders"
        )
    classes = source.classes
    if classes is None and nb_classes is None:
        raise OptionError(f"{option}: {source.no_classes}")
    count = nb_classes or len(classes or ())
    if classes is not None and len(classes) > count:
        raise OptionError(
            f"--nb_classes {count} is fewer than the {len(classes)} classes of {option}: "
            f"{listed(classes)}{_largest(source)}"
        )
    if count < 2:
        raise OptionError(
            f"{option} has {count} class: {listed(classes or ())}; expected two at least, which is "
            "what a classifier tells apart: do the class folders lie one folder deeper?"
        )
    if count > MOST_CLASSES:
        raise OptionError(f"{option} has {count} classes; expected {MOST_CLASSES} at most")
    source.expect_labels(ExpectedLabels(count))
    if source.numbers is not None:
        largest, told = source.numbers.largest, "labels are numbers, without names of classes"
        if largest is not None and largest >= count:
            raise OptionError(
                f"--nb_classes {count} is too few for {option}{_largest(source)}; expected labels "
                f"from 0 to {count - 1}"
            )
        if largest is not None:
            told += f"; the largest is {largest} of {source.numbers.where}"
        return ClassNumbers.of(count), [told]
    assert classes is not None
    problem = name_problem(classes)
    if problem is not None:
        raise OptionError(f"{option}: {problem}; expected names that differ from each other")
    return ClassNames.padded(classes, count), [f"classes: {listed(classes)}", *case_notes(classes)]


def _largest(source: Source) -> str:
    if source.numbers is None or source.numbers.largest is None:
        return ""
    return f" (label {shown_number(source.numbers.largest)}: {source.numbers.where})"


def match_labels(
    source: Source,
    known: Sequence[str] | None,
    count: int,
    data: str,
    model: str,
    all_of_them: bool = False,
) -> list[str]:
    """Makes the labels of `source` those of a model, by the names of their classes.

    Arguments and errors are those of `match_classes`.

    Returns:
        What to tell about it.
    """
    check_labels(source, data)
    match = match_classes(
        source.classes, source.numbers, known, count, data, model, all_of_them=all_of_them
    )
    source.expect_labels(ExpectedLabels(count, match.numbers))
    notes = list(match.notes)
    if source.empty_classes:
        notes.append(f"{data} has folders that hold no picture: {listed(source.empty_classes)}")
    return [f"note: {note}" for note in notes]
