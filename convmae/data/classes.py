"""Names of classes: what labels stand for, and which class of a data set is which of a model.

Names are compared in Unicode's composed form (NFC), as file systems differ in it, and otherwise
letter by letter: `Cat` and `cat` are two classes.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from convmae.config.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MOST_SHOWN = 10  # names of a list in a message
LONGEST_SHOWN = 60  # characters of a name in a message
UNNAMED = "unnamed {}"  # a class that a model has room for, and its data had not


class ClassNames(tuple[str, ...]):
    """Names of what a model tells apart, in the order of its scores."""

    @staticmethod
    def padded(names: Iterable[str], count: int) -> ClassNames:
        """`names` as they are kept, with unnamed classes after them that make them `count`."""
        known = list(map(normal_form, names))
        return ClassNames([*known, *(UNNAMED.format(i) for i in range(len(known), count))])


class ClassNumbers(ClassNames):
    """ "0", "1" ...: the data that the model learned from had numbers alone, and no names."""

    @staticmethod
    def of(count: int) -> ClassNumbers:
        """The numbers below `count`."""
        return ClassNumbers(map(str, range(count)))


@dataclass(frozen=True)
class NumberLabels:
    """Labels that are numbers alone.

    Attributes:
        largest: the largest of them; None where they are known only when they are read.
        where: what holds it, to name in messages.
    """

    largest: int | None = None
    where: str = ""


def normal_form(name: str) -> str:
    """The form in which names are compared and kept."""
    return unicodedata.normalize("NFC", name)


def number_classes(count: int) -> list[str]:
    """ "0" to `count - 1`."""
    return [str(number) for number in range(count)]


def whole_number(text: str) -> int | None:
    """The whole number that `text` is, in decimal digits and nothing else; None if it is none."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 4000 else None


def name_problem(names: Sequence[str]) -> str | None:
    """Why `names` cannot tell classes apart, in words; None if they can."""
    blank = [number for number, name in enumerate(names) if not name.strip()]
    if blank:
        return f"the name of class {blank[0]} is empty"
    common = [name for name, count in Counter(map(normal_form, names)).items() if count > 1]
    if common:
        first, second = [i for i, name in enumerate(names) if normal_form(name) == common[0]][:2]
        form = "" if names[first] == names[second] else " (but for the form of Unicode)"
        return f"classes {first} and {second} have the same name, {shown(common[0])}{form}"
    return None


def shown(name: str) -> str:
    """A name for a message: quoted, on one line, not too long."""
    return repr(name if len(name) <= LONGEST_SHOWN else f"{name[:LONGEST_SHOWN]}...")


def listed(names: Sequence[str], most: int = MOST_SHOWN) -> str:
    """The first names for a message, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + more


def counted(classes: Sequence[str]) -> str:
    """How many classes, in words."""
    return "1 class" if len(classes) == 1 else f"{len(classes)} classes"


# -- matching -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassMatch:
    """Which class of a data set is which of a model.

    Attributes:
        numbers: of each class of the data the model's number; None where labels are these already.
        notes: what is to be told about it.
    """

    numbers: tuple[int, ...] | None
    notes: tuple[str, ...] = ()


def match_classes(
    names: Sequence[str] | None,
    numbers: NumberLabels | None,
    known: Sequence[str] | None,
    count: int,
    data: str,
    model: str,
    all_of_them: bool = False,
) -> ClassMatch:
    """Matches the classes of a data set with those of a model, by their names.

    Args:
        names: of the data's classes; they count where `numbers` is None.
        numbers: what is known of labels that are numbers alone.
        known: the names of the model's classes; None where nothing tells them.
        count: how many classes the model has.
        data, model: what to call them in messages.
        all_of_them: whether no class of the model may lack in the data.

    Raises:
        OptionError: a class that the model does not know, names that differ, or numbers that are
            too large or could mean two things.
    """
    if known is not None:
        _check_known(known, count, model)
    if numbers is not None:
        return _match_numbers(numbers, known, count, data, model)
    assert names is not None
    problem = name_problem(names)
    if problem is not None:
        raise OptionError(f"{data}: {problem}; expected names that differ from each other")
    if known is None or (isinstance(known, ClassNumbers) and not set(names) & set(known)):
        return _match_positions(names, count, data, model)
    return _match_names(names, known, data, model, all_of_them)


def _check_known(known: Sequence[str], count: int, model: str) -> None:
    problem = name_problem(known)
    if len(known) != count:
        problem = f"it names {len(known)} classes, but its head has {count}"
    if problem is not None:
        raise OptionError(f"the class names in {model} cannot be used: {problem}")


def _match_numbers(
    numbers: NumberLabels, known: Sequence[str] | None, count: int, data: str, model: str
) -> ClassMatch:
    if numbers.largest is not None and numbers.largest >= count:
        raise OptionError(
            f"{data} has label {shown_number(numbers.largest)} ({numbers.where}), but {model} has "
            f"{count} classes; expected labels from 0 to {count - 1}"
        )
    if known is None or list(known) == number_classes(count):
        return ClassMatch(None)
    twofold = [(i, name) for i, name in enumerate(known) if _may_be_place(name, i, count)]
    if twofold:
        place, name = twofold[0]
        raise OptionError(
            f"the labels of {data} are numbers without names, and {model} has classes that are "
            f"named by other numbers than their places: label {name} could be its class number "
            f"{name} or its class {place}, named {shown(name)}. Tell the names of the data: class "
            'folders, or "classes" in the sizes.json of shards'
        )
    return ClassMatch(
        None,
        (
            f"the labels of {data} are numbers without names: they are taken as places among the "
            f"{count} classes of {model} (0 is {shown(known[0])})",
        ),
    )


def _may_be_place(name: str, place: int, count: int) -> bool:
    number = whole_number(name)
    return number is not None and number < count and number != place


def _match_positions(names: Sequence[str], count: int, data: str, model: str) -> ClassMatch:
    if len(names) != count:
        raise OptionError(
            f"{data} has {counted(names)} ({listed(names)}), but {model} has {count}, whose "
            "names it does not tell; expected as many, to be matched in sorted order"
        )
    return ClassMatch(
        tuple(range(count)),
        (
            f"{model} does not tell the names of its {count} classes: the classes of {data} are "
            f"matched with them in sorted order (0 is {shown(names[0])})",
        ),
    )


def _match_names(
    names: Sequence[str], known: Sequence[str], data: str, model: str, all_of_them: bool
) -> ClassMatch:
    place = {normal_form(name): number for number, name in enumerate(known)}
    there = {normal_form(name) for name in names}
    unknown = [name for name in names if normal_form(name) not in place]
    absent = [
        name
        for number, name in enumerate(known)
        if normal_form(name) not in there and name != UNNAMED.format(number)
    ]
    if unknown or (absent and all_of_them):
        raise OptionError(_differing(names, unknown, known, absent, data, model))
    notes = []
    if absent:
        notes.append(
            f"{data} has no pictures of {len(absent)} of the {len(known)} classes of {model}: "
            f"{listed(absent)}"
        )
    return ClassMatch(tuple(place[normal_form(name)] for name in names), tuple(notes))


def _differing(
    names: Sequence[str],
    unknown: Sequence[str],
    known: Sequence[str],
    absent: Sequence[str],
    data: str,
    model: str,
) -> str:
    parts = []
    if unknown:
        parts.append(
            f"{data} has {counted(names)}, of which {model} does not know {len(unknown)}: "
            f"{listed(unknown)}{_near(unknown, known)}"
        )
    if absent:
        parts.append(
            f"{model} has {counted(known)}, of which {data} lacks {len(absent)}: {listed(absent)}"
        )
    first = [*unknown, *(name for name in names if name not in set(unknown))]
    other = [*absent, *(name for name in known if name not in set(absent))]
    return (
        f"{'; '.join(parts)}. Found {counted(names)}: {listed(first)}; expected the names of "
        f"{counted(known)}: {listed(other)}. Classes are matched by name: rename or remove those "
        "that differ"
    )


def _near(unknown: Sequence[str], known: Sequence[str]) -> str:
    """Which unknown name differs from a known one by case or blanks alone, in words."""
    plain = {_folded(name): name for name in known}
    for name in unknown:
        if _folded(name) in plain:
            how = f"{shown(name)} differs from {shown(plain[_folded(name)])} by case or blanks only"
            return f" ({how})"
    return ""


def _folded(name: str) -> str:
    return normal_form(name).casefold().strip()


def shown_number(number: int) -> str:
    """A whole number for a message, which may have thousands of digits."""
    text = str(number)
    return text if len(text) <= 20 else f"{text[:10]}... ({len(text)} digits)"


def case_notes(names: Sequence[str]) -> list[str]:
    """What to tell of names that differ by case or blanks alone."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_folded(name), []).append(name)
    alike = [group for group in groups.values() if len(group) > 1]
    if not alike:
        return []
    return [f"note: classes {listed(alike[0])} differ by case or blanks only; they are kept apart"]
