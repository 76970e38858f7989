"""Labels of shards, which are text: counted before a run, and read as numbers in it.

A `.cls` is a whole number, the place of the class from 0, or where `sizes.json` names the classes,
one of these names. A whole number below the number of classes is always a place. One that is not
below it is a name, if it is a name and no other name could be a place (as WordNet's numbers).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from convmae.data.classes import (
    NumberLabels,
    listed,
    normal_form,
    number_classes,
    shown,
    shown_number,
    whole_number,
)
from convmae.data.errors import UnreadableError

if TYPE_CHECKING:
    from collections.abc import Sequence

LABEL = "cls"
LONGEST_LABEL = 1024  # bytes
MOST_LABELS = 100_000  # different ones that are kept while counting
# Numbers without names may have gaps: up to the first many classes, or the second times as many
# classes as labels occur. More would be made for labels that are no places, such as years or ids.
ALWAYS_PLAUSIBLE, PLAUSIBLE_TIMES = 1000, 10
NAMES_HELP = (
    'list the names of the classes as "classes" in sizes.json, which '
    "`python -m convmae.data.shards FOLDER` writes"
)


def label_text(data: bytes) -> str:
    """The label that a `.cls` holds."""
    return normal_form(data[:LONGEST_LABEL].decode("utf-8", "replace").strip())


@dataclass
class LabelTally:
    """The different labels of shards, and where each was seen first.

    Attributes:
        numbers, texts: labels that are whole numbers, and others, with the sample of the first.
        largest: of the numbers, and its sample.
    """

    numbers: dict[int, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    largest: tuple[int, str] | None = None

    def add(self, text: str, where: str) -> None:
        """Counts a label; `where` names its sample."""
        number = whole_number(text)
        if number is not None:
            if self.largest is None or number > self.largest[0]:
                self.largest = number, where
            if len(self.numbers) < MOST_LABELS:
                self.numbers.setdefault(number, where)
        elif len(self.texts) < MOST_LABELS:
            self.texts.setdefault(text, where)

    def update(self, other: LabelTally) -> None:
        """Counts what another has counted, after what this one has."""
        for mine, others in ((self.numbers, other.numbers), (self.texts, other.texts)):
            _add_new(mine, others)
        if self.largest is None or (
            other.largest is not None and other.largest[0] > self.largest[0]
        ):
            self.largest = other.largest

    def number_labels(self) -> NumberLabels | None:
        """What is known of labels that are numbers; None if there is none."""
        return None if self.largest is None else NumberLabels(*self.largest)

    def classes(self) -> list[str] | None:
        """ "0" to the largest label; None without numbers, or where `problem` tells why not."""
        if self.largest is None or self.largest[0] >= self._limit():
            return None
        return number_classes(self.largest[0] + 1)

    def names(self) -> list[str] | None:
        """The labels themselves as names, sorted; None where one could be a place or a mistake.

        They are words, or whole numbers of which none could be the place of a class; and they are
        all that there are.
        """
        if max(len(self.texts), len(self.numbers)) >= MOST_LABELS:
            return None
        if self.texts and not self.numbers and not any(map(_is_number, self.texts)):
            return sorted(self.texts)
        if self.numbers and not self.texts and min(self.numbers) >= len(self.numbers) > 1:
            return [str(number) for number in sorted(self.numbers)]
        return None

    def problem(self) -> str | None:
        """Why the labels tell no number of classes, in words; None if they do or there are none."""
        if self.largest is not None:
            number, where = self.largest
            if number < self._limit():
                return None
            return (
                f"label {shown_number(number)} ({where}) is too large for the "
                f"place of a class: {len(self.numbers)} different labels occur; expected numbers "
                f"below {self._limit()}, or --nb_classes, or {NAMES_HELP}"
            )
        if self.texts:
            text, where = next(iter(self.texts.items()))
            return (
                f"label {shown(text)} ({where}) is no whole number, and nor is any other; expected "
                f"0, 1 ..., or {NAMES_HELP}"
            )
        return None

    def _limit(self) -> int:
        return max(ALWAYS_PLAUSIBLE, PLAUSIBLE_TIMES * len(self.numbers))


def _add_new(mine: dict[Any, str], others: dict[Any, str]) -> None:
    """Adds entries with new keys, up to `MOST_LABELS`."""
    new = (item for item in others.items() if item[0] not in mine)
    mine.update(islice(new, max(0, MOST_LABELS - len(mine))))


def _is_number(text: str) -> bool:
    """Whether a label that is no whole number is a number still, or nothing: a mistake, no name."""
    try:
        float(text or "nan")
    except ValueError:
        return False
    return True


class LabelReader:
    """From the text of a label to the number of its class.

    Args:
        classes: names of the classes; None where labels are numbers alone.
    """

    def __init__(self, classes: Sequence[str] | None) -> None:
        self.classes = None if classes is None else list(classes)
        self.places = {normal_form(name): i for i, name in enumerate(self.classes or ())}
        numbers = ((i, whole_number(name)) for name, i in self.places.items())
        self.names_are_places = any(
            number is not None and number < len(self.places) and number != i
            for i, number in numbers
        )

    def number(self, text: str | None) -> int:
        """The number of a label.

        Raises:
            UnreadableError: it is missing, no whole number and no name, or too large.
        """
        if text is None:
            raise UnreadableError(f"it has no .{LABEL}, as others have")
        number = whole_number(text)
        if self.classes is None:
            if number is None:
                raise UnreadableError(f"its .{LABEL} is {shown(text)}; expected a whole number")
            return number
        if number is not None and number < len(self.classes):
            return number
        if text in self.places and (number is None or not self.names_are_places):
            return self.places[text]
        found = shown(text) if number is None else shown_number(number)
        raise UnreadableError(
            f"its .{LABEL} is {found}; expected a whole number below {len(self.classes)}, the "
            f"number of classes, or a name of one ({listed(self.classes, 3)})"
        )
