"""Names of classes: how those of a data set and of a model are matched, and what is refused."""

from __future__ import annotations

import unicodedata

import pytest

from convmae import OptionError
from convmae.data.classes import (
    ClassNames,
    ClassNumbers,
    NumberLabels,
    match_classes,
    name_problem,
)

NUMBERS = NumberLabels(2, "shard.tar: s7")


def match(names, known, numbers=None, count=None, all_of_them=False):
    count = len(known) if count is None else count
    return match_classes(names, numbers, known, count, "DATA", "MODEL", all_of_them)


@pytest.mark.parametrize(
    ("names", "places"),
    [
        (["ant", "bee", "cat"], (2, 0, 1)),
        (["cat", "bee", "ant"], (1, 0, 2)),
        (["cat"], (1,)),
        ([], ()),
    ],
)
def test_classes_are_matched_by_name(names: list[str], places: tuple[int, ...]) -> None:
    known = ClassNames(["bee", "cat", "ant"])
    found = match(names, known)
    assert found.numbers == places
    absent = [name for name in known if name not in names]
    assert all(repr(name) in "".join(found.notes) for name in absent)
    assert len(found.notes) == bool(absent)


def test_an_absent_class_is_told_with_counts() -> None:
    (note,) = match(["ant"], ClassNames(["bee", "cat", "ant"])).notes
    assert note == "DATA has no pictures of 2 of the 3 classes of MODEL: 'bee', 'cat'"


def test_unknown_classes_are_refused_with_both_lists() -> None:
    with pytest.raises(OptionError) as error:
        match(["ant", "wolf"], ClassNames(["bee", "ant"]))
    text = str(error.value)
    assert "DATA has 2 classes, of which MODEL does not know 1: 'wolf'" in text
    assert "MODEL has 2 classes, of which DATA lacks 1: 'bee'" in text
    assert "Found 2 classes: 'wolf', 'ant'" in text  # what differs comes first
    assert "expected the names of 2 classes: 'bee', 'ant'" in text
    assert "rename or remove" in text
    with pytest.raises(OptionError, match="'Bee' differs from 'bee' by case or blanks only"):
        match(["ant", "Bee"], ClassNames(["bee", "ant"]))
    with pytest.raises(OptionError, match="'ant ' differs from 'ant'"):
        match(["ant "], ClassNames(["bee", "ant"]))


def test_long_lists_are_cut() -> None:
    known = ClassNames([f"class {i:04}" for i in range(1000)])
    with pytest.raises(OptionError) as error:
        match([*known[:500], "x" * 5000], known)
    text = str(error.value)
    assert "501 classes, of which MODEL does not know 1" in text
    assert "1000 classes, of which DATA lacks 500" in text
    assert "and 490 more" in text and "and 491 more" in text and len(text) < 2000


def test_case_and_the_forms_of_unicode() -> None:
    composed, apart = "café", unicodedata.normalize("NFD", "café")
    assert composed != apart
    assert match([apart, "Cafe"], ClassNames(["Cafe", composed])).numbers == (1, 0)
    assert match(["cat", "Cat"], ClassNames(["Cat", "cat"])).numbers == (1, 0)
    problem = name_problem([composed, "x", apart])
    assert problem is not None and "classes 0 and 2 have the same name" in problem
    assert "form of Unicode" in problem


@pytest.mark.parametrize("names", [["a", "b", "a"], ["a", ""], ["a", " \n"]])
def test_names_that_tell_nothing_apart_are_refused(names: list[str]) -> None:
    with pytest.raises(OptionError, match="DATA: .*; expected names that differ"):
        match(names, ClassNames(["a", "b"]))
    with pytest.raises(OptionError, match="the class names in MODEL cannot be used"):
        match(["a"], ClassNames(names))


def test_names_of_another_number_than_the_head() -> None:
    with pytest.raises(OptionError, match="it names 2 classes, but its head has 3"):
        match(["a"], ClassNames(["a", "b"]), count=3)


def test_all_classes_may_be_asked_for() -> None:
    known = ClassNames.padded(["b", "a"], 4)
    assert known == ("b", "a", "unnamed 2", "unnamed 3")
    assert match(["a", "b"], known, all_of_them=True) == match(["a", "b"], known)
    assert match(["a", "b"], known).notes == ()
    with pytest.raises(OptionError, match="4 classes, of which DATA lacks 1: 'b'"):
        match(["a"], known, all_of_them=True)


def test_without_names_the_counts_agree_and_order_decides() -> None:
    for known in (None, ClassNumbers.of(2)):
        found = match(["ant", "bee"], known, count=2)
        assert found.numbers == (0, 1) and "in sorted order (0 is 'ant')" in found.notes[0]
        with pytest.raises(OptionError, match=r"DATA has 1 class \('ant'\), but MODEL has 2"):
            match(["ant"], known, count=2)


def test_folders_named_by_numbers_are_these_numbers() -> None:
    """Sorted as text, 10 comes before 2."""
    names = sorted(map(str, range(12)))
    assert match(names, ClassNumbers.of(12)).numbers == tuple(map(int, names))
    with pytest.raises(OptionError, match="'three'"):
        match(["0", "1", "2", "three"], ClassNumbers.of(4))


def test_numbers_are_places() -> None:
    for known in (None, ClassNumbers.of(3), ClassNames(["0", "1", "2"])):
        found = match(["0", "1", "2"], known, NUMBERS, count=3)
        assert found.numbers is None and found.notes == ()
    (note,) = match(["0", "1", "2"], ClassNames(["x", "y", "z"]), NUMBERS).notes
    assert "taken as places among the 3 classes of MODEL (0 is 'x')" in note
    with pytest.raises(OptionError, match=r"DATA has label 2 \(shard.tar: s7\), but MODEL has 2"):
        match(["0", "1", "2"], None, NUMBERS, count=2)


def test_numbers_that_may_be_names_are_refused() -> None:
    with pytest.raises(OptionError, match=r"label 1 could be its class number 1 or its class 0"):
        match(None, ClassNames(["1", "2", "3"]), NUMBERS)
