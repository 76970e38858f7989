"""Labels of shards: numbers and names, what is too large, and what is none."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from convmae import OptionError
from convmae.data import DataError, UnreadableError, labels, open_source, shards
from convmae.data.labels import LabelReader, LabelTally
from convmae.tasks.matching import classes_to_learn, match_labels
from tests.support.shard_files import TINY, picture, write_shard

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("torchvision")
pytest.importorskip("webdataset")

WORDNET = ["1440764", "1443537", "2102040"]
HUGE = ["999999999", "9" * 400, str(2**63), "1440764"]


def labelled(folder: Path, labels: list[str], names: Any = None) -> Path:
    """A shard of a sample for each label, and `sizes.json` with these names of classes."""
    members = []
    for number, label in enumerate(labels):
        members += [(f"s{number}.png", picture(number)), (f"s{number}.cls", label.encode())]
    write_shard(folder / "a.tar", members)
    if names is not None:
        sizes = {"a.tar": len(labels), "classes": names}
        (folder / "sizes.json").write_text(json.dumps(sizes))
    return folder


def labels_of(source: Any) -> list[int]:
    return [
        label
        for batch in source.evaluation_batches(TINY, 4, workers=0)
        for label in batch.labels.tolist()
    ][: source.pictures]


# -- too large ------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", HUGE)
def test_no_class_is_made_for_a_huge_label(tmp_path: Path, label: str) -> None:
    source = open_source(labelled(tmp_path, ["0", "1", label]))
    assert source.classes is None  # nothing of that length
    with pytest.raises(OptionError) as error:
        classes_to_learn(source, None, "DATA")
    text = str(error.value)
    assert f"label {label[:10]}" in text and f"({tmp_path / 'a.tar'}: s2)" in text
    assert "3 different labels occur; expected numbers below 1000" in text
    assert "nb_classes" in text and "sizes.json" in text
    with pytest.raises(OptionError, match=r"nb_classes 5 is too few .*a.tar: s2\); expected .* 4"):
        classes_to_learn(source, 5, "DATA")
    with pytest.raises(OptionError, match=r"DATA has label .* but MODEL has 2 classes"):
        match_labels(source, None, 2, "DATA", "MODEL")


@pytest.mark.parametrize("label", [*HUGE, "-1", "1.0", "cat", "", "1e400", "nan", "9" * 5000])
def test_pictures_of_any_label_can_be_pretrained_on(tmp_path: Path, label: str) -> None:
    source = open_source(labelled(tmp_path, ["0", label, "1"]))
    (batch,) = source.batches(TINY, 3, 0, 1, workers=0)
    assert batch.failures == [] and sorted(batch.keys[:, 1].tolist()) == [0, 1, 2]


def test_gaps_are_allowed_within_reason(tmp_path: Path) -> None:
    source = open_source(labelled(tmp_path, ["0", "999"]))
    assert source.classes is not None and len(source.classes) == 1000
    assert len(classes_to_learn(source, None, "DATA")[0]) == 1000
    source = open_source(labelled(tmp_path, ["0", "1000"]))
    assert source.classes is None
    names, _ = classes_to_learn(source, 1001, "DATA")
    assert len(names) == 1001 and labels_of(source) == [0, 1000]
    tally = LabelTally()
    for number in (*range(200), 1999):
        tally.add(str(number), "x")
    assert len(tally.classes() or ()) == 2000 and tally.problem() is None
    tally.add("2020", "y")
    assert tally.classes() is None and "2020 (y)" in str(tally.problem())


def test_labels_that_were_not_counted_need_a_number_of_classes(tmp_path: Path) -> None:
    labelled(tmp_path, ["2", "0"])
    (tmp_path / "sizes.json").write_text('{"a.tar": 2}')
    source = open_source(tmp_path)
    assert source.classes is None
    with pytest.raises(OptionError, match="how many there are is not known; list .* nb_classes"):
        classes_to_learn(source, None, "DATA")
    assert classes_to_learn(source, 3, "DATA")[0] == ("0", "1", "2") and labels_of(source) == [2, 0]
    match_labels(source, ("x", "y", "z"), 3, "DATA", "MODEL")
    assert labels_of(source) == [2, 0]
    match_labels(source, None, 2, "DATA", "MODEL")
    with pytest.raises(DataError, match=r"a.tar: s0 has label 2, but there are 2 classes; .* 1"):
        labels_of(source)


# -- what is no number ----------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["-1", "1.0", "cat", "", "1e400"])
def test_labels_that_are_no_numbers(tmp_path: Path, label: str) -> None:
    source = open_source(labelled(tmp_path, [label, label]))
    with pytest.raises(OptionError) as error:
        classes_to_learn(source, 3, "DATA")
    assert f"label {label!r} ({tmp_path / 'a.tar'}: s0) is no whole number" in str(error.value)
    source = open_source(labelled(tmp_path, ["0", "1", label]))
    classes_to_learn(source, None, "DATA")
    (batch,) = source.batches(TINY, 3, 0, 1, workers=0)
    (failure,) = batch.failures
    assert failure.name.endswith("s2")
    assert failure.reason == f"its .cls is {label!r}; expected a whole number"


def test_names_are_labels_too(tmp_path: Path) -> None:
    source = open_source(
        labelled(tmp_path, ["dog", "1", "cat", "cafe\u0301"], ["cat", "dog", "café"])
    )
    assert source.classes == ["cat", "dog", "café"] and source.numbers is None
    names, _ = classes_to_learn(source, None, "DATA")
    assert names == ("cat", "dog", "café") and labels_of(source) == [1, 1, 0, 2]
    match_labels(source, ("café", "dog", "cat"), 3, "DATA", "MODEL")
    assert labels_of(source) == [1, 1, 2, 0]


def test_a_number_is_a_place_unless_it_cannot_be_one() -> None:
    reader = LabelReader(WORDNET)
    assert [reader.number(text) for text in (*WORDNET, "0", "2")] == [0, 1, 2, 0, 2]
    reader = LabelReader(["1", "2", "3"])
    assert [reader.number(text) for text in "012"] == [0, 1, 2]
    for text in ("3", "-1", "x", "9" * 3000):
        with pytest.raises(UnreadableError, match="whole number below 3, .* or a name of one"):
            reader.number(text)


def test_the_different_labels_that_are_kept_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "MOST_LABELS", 5)
    whole = LabelTally()
    for first in (0, 100):
        part = LabelTally()
        for number in range(first, first + 20):
            part.add(f"caption {number}", f"s{number}")
            part.add(str(number), f"s{number}")
        assert len(part.texts) == len(part.numbers) == 5
        whole.update(part)
    assert list(whole.texts) == [f"caption {i}" for i in range(5)]
    assert len(whole.numbers) == 5 and whole.largest == (119, "s119")
    words = LabelTally(texts={"a": "x", "b": "x", "c": "x", "d": "x"})
    assert words.names() == ["a", "b", "c", "d"]
    words.add("e", "x")
    assert words.names() is None  # there may be more


# -- sizes.json -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names", [["cat", "cat"], ["cat", ""], ["cafe\u0301", "café"], ["a", "b", "\n"]]
)
def test_names_in_sizes_differ(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(DataError, match=r'sizes.json: "classes": .*; expected a name for each'):
        open_source(labelled(tmp_path, ["0"], names))


def test_numbers_in_sizes_are_no_names(tmp_path: Path) -> None:
    source = open_source(labelled(tmp_path, ["0", "1"], ["0", "1", "2"]))
    assert source.classes == ["0", "1", "2"] and source.numbers is not None
    source = open_source(labelled(tmp_path, ["0", "1"], ["2", "1", "0"]))
    assert source.numbers is None


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["dog", "cat", "dog"], ["cat", "dog"]),
        (WORDNET[::-1], WORDNET),
        (["n02", "n01"], ["n01", "n02"]),
        (["0", "2"], ["0", "1", "2"]),
    ],
)
def test_labels_become_names_in_sizes(tmp_path: Path, labels: list[str], names: list[str]) -> None:
    labelled(tmp_path, labels)
    lines: list[str] = []
    assert shards.main([str(tmp_path)], lines.append) == 0
    assert json.loads((tmp_path / "sizes.json").read_text())["classes"] == names
    source = open_source(tmp_path)
    assert source.classes == names
    classes_to_learn(source, None, "DATA")
    assert labels_of(source) == [names.index(label) for label in labels]
    assert ("named by their labels" in lines[0]) == (labels != ["0", "2"])


@pytest.mark.parametrize("labels", [["0", "999999999"], ["cat", ""], ["-1", "-2"], ["cat", "nan"]])
def test_labels_that_are_mistakes_become_no_names(tmp_path: Path, labels: list[str]) -> None:
    labelled(tmp_path, labels)
    before = tmp_path / "sizes.json"
    before.write_text("{}")
    lines: list[str] = []
    assert shards.main([str(tmp_path)], lines.append) == 2
    assert lines[-1].startswith("error: label ") and "a.tar: s" in lines[-1]
    assert before.read_text() == "{}"
