"""Splits of one tree of class folders: lists of names, as RESISC45 has them, or a share."""

from __future__ import annotations

import csv
import itertools
from typing import TYPE_CHECKING, Any

import pytest

from convmae import (
    DataError,
    EvaluateConfig,
    FinetuneConfig,
    OptionError,
    PredictConfig,
    PretrainConfig,
    StatsConfig,
    evaluate,
    finetune,
    open_weights,
    predict,
    stats,
)
from convmae.config import read_yaml
from convmae.config.data import PictureChoice
from convmae.data import open_source
from convmae.records.folder import RunFolder
from convmae.records.log import read_log
from tests.support.paths import RECIPES
from tests.support.training_runs import DEVICE

if TYPE_CHECKING:
    from pathlib import Path

    from convmae.data import Source

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("torchvision")
pytest.importorskip("timm")
pytest.importorskip("torchmetrics")

COLOURS = {"airplane": (200, 40, 40), "dense_residential": (40, 200, 40), "lake": (40, 40, 200)}
EACH = 10  # pictures of a class; 6 of them in train, 2 in val, 2 in test
SPLITS = {"train": range(1, 7), "val": range(7, 9), "test": range(9, 11)}
SHORT: dict[str, Any] = {
    "model": "convvit_tiny",
    "input_size": 32,
    "batch_size": 6,
    "epochs": 2,
    "warmup_epochs": 0,
    "lr": 1e-3,
    "num_workers": 0,
    "amp": "float32",
    "device": DEVICE,
}


@pytest.fixture(scope="module")
def resisc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout of RESISC45: `NWPU-RESISC45/<class>/<class>_NNN.jpg`, lists of names beside it."""
    root = tmp_path_factory.mktemp("resisc")
    for name, colour in COLOURS.items():
        folder = root / "NWPU-RESISC45" / name
        folder.mkdir(parents=True)
        for number in range(1, EACH + 1):
            shade = tuple(value + 5 * number for value in colour)
            Image.new("RGB", (40, 40), shade).save(folder / f"{name}_{number:03}.jpg")
    for split, numbers in SPLITS.items():
        lines = [f"{name}_{number:03}.jpg\n" for name in COLOURS for number in numbers]
        (root / f"resisc45-{split}.txt").write_text("".join(reversed(lines)))
    return root


def listed(resisc: Path, lines: list[str], **options: Any) -> Source:
    file = resisc / "own.txt"
    file.write_text("\n".join(lines))
    choice = PictureChoice("train_list", str(file))
    return open_source(resisc / "NWPU-RESISC45", choice=choice, **options)


def names(source: Any) -> list[str]:
    return [name for name, _ in source.entries()]


def training(resisc: Path, output: Path, **changes: Any) -> FinetuneConfig:
    lists = {f"{split}_list": str(resisc / f"resisc45-{split}.txt") for split in ("train", "val")}
    paths = {"data_path": str(resisc / "NWPU-RESISC45"), "output_dir": str(output)}
    return FinetuneConfig(**(SHORT | paths | lists | changes))


# -- the whole way --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(resisc: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run") / "resisc"
    summary = finetune(training(resisc, output, epochs=3, eval_every=3))
    assert summary.evaluation["acc1"] > 60  # of three plain colours
    return output


def test_a_classifier_learns_the_listed_split(resisc: Path, run: Path) -> None:
    (left_out,) = [e for e in read_log(run) if e.get("event") == "left_out"]
    assert left_out["count"] == 12 and "12 not in resisc45-train.txt" in left_out["what"]
    assert open_weights(run).classes == tuple(COLOURS)
    options = read_yaml(RunFolder.of(run).options)
    assert options["train_list"] == str(resisc / "resisc45-train.txt")
    assert not RunFolder.of(run).val_list.exists()


def test_evaluate_and_predict_read_the_test_list(resisc: Path, run: Path, tmp_path: Path) -> None:
    data, test = str(resisc / "NWPU-RESISC45"), str(resisc / "resisc45-test.txt")
    shared = {"device": DEVICE, "num_workers": 0, "picture_list": test}
    result = evaluate(EvaluateConfig(str(run / "best"), data, **shared))
    assert result["images"] == 3 * 2 and result["acc1"] > 60
    assert result["left_out"] == [
        f"24 files in {data} are left out: 24 not in resisc45-test.txt "
        "(airplane/airplane_001.jpg, airplane/airplane_002.jpg, airplane/airplane_003.jpg, ...)"
    ]
    table = tmp_path / "classes.csv"
    predict(PredictConfig(str(run / "best"), data, output=str(table), **shared))
    rows = list(csv.DictReader(table.open()))
    of_test = {f"{name}/{name}_{n:03}.jpg" for name in COLOURS for n in SPLITS["test"]}
    assert {next(iter(row.values())) for row in rows} == of_test and len(rows) == 6


def test_a_run_goes_on_with_the_same_pictures_only(resisc: Path, run: Path, tmp_path: Path) -> None:
    more = training(resisc, run, epochs=4, resume="auto")
    assert finetune(more).epochs == 4
    shorter = tmp_path / "shorter.txt"
    shorter.write_text((resisc / "resisc45-train.txt").read_text().partition("\n")[2])
    changed = training(resisc, run, epochs=5, resume="auto", train_list=str(shorter))
    with pytest.raises(OptionError, match=r"1 removed \(lake/lake_006.jpg\)"):
        finetune(changed)


def test_statistics_and_pretraining_take_a_list_too(resisc: Path, tmp_path: Path) -> None:
    data, train = str(resisc / "NWPU-RESISC45"), str(resisc / "resisc45-train.txt")
    assert "# 18 pictures in" in stats(StatsConfig(data, picture_list=train, num_workers=0))
    assert PretrainConfig(data_path=data, train_list=train).train_choice == PictureChoice(
        "train_list", train
    )


def test_the_recipe_names_the_files_of_the_data_set() -> None:
    (recipe,) = RECIPES.glob("resisc45-*.yaml")
    values = read_yaml(recipe)
    assert values["data_path"].endswith("NWPU-RESISC45")
    lists = [values["train_list"], values["val_list"]]
    assert [path.rpartition("/")[2] for path in lists] == [
        "resisc45-train.txt",
        "resisc45-val.txt",
    ]


# -- lists ----------------------------------------------------------------------------------------


def test_names_may_have_folders_and_endings_or_not(resisc: Path) -> None:
    first = [
        "airplane_001.jpg",
        "airplane_002",
        "",
        "./lake/lake_001.jpg ",
        "dense_residential/dense_residential_003",
    ]
    source = listed(resisc, first)
    assert names(source) == [
        "airplane/airplane_001.jpg",
        "airplane/airplane_002.jpg",
        "dense_residential/dense_residential_003.jpg",
        "lake/lake_001.jpg",
    ]
    assert source.classes == list(COLOURS) and source.empty_classes == ()
    assert [source.photos.label(place) for place in range(4)] == [0, 0, 1, 2]  # type: ignore


def test_a_class_that_is_not_listed_is_refused_in_training(resisc: Path, tmp_path: Path) -> None:
    some = tmp_path / "some.txt"
    some.write_text(
        "".join(f"{name}_00{n}\n" for name in ("airplane", "lake") for n in SPLITS["train"])
    )
    with pytest.raises(OptionError, match=r"no picture .*: 'dense_residential'; expected"):
        finetune(training(resisc, tmp_path / "run", train_list=str(some)))
    assert not (tmp_path / "run").exists()


def test_missing_and_doubled_names_are_counted(resisc: Path) -> None:
    many = [f"airplane_{n:03}" for n in range(1, EACH + 1)]
    source = listed(resisc, [*many, "airplane_001", "airplane_999"], max_unreadable=0.2)
    assert source.pictures == EACH
    assert str(source.left_out[-1]) == (
        "2 lines of own.txt are left out: 1 of no picture (airplane_999), "
        "1 there twice (airplane_001)"
    )
    with pytest.raises(DataError, match=r"10 of the 11 names .* missing are 'airplane_999'; "):
        listed(resisc, [*many, "airplane_999"], max_unreadable=0.01)
    with pytest.raises(DataError, match=r"0 of the 1 names .* are like 'airplane/airplane_001.j"):
        listed(resisc, ["sea_001.jpg"], max_unreadable=1.0)


def test_names_of_several_pictures_are_refused(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/1.jpg", "b/2.png", "c/2.png"):
        (tmp_path / "NWPU-RESISC45" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "NWPU-RESISC45" / name)
    for line, found in (("1", "a/1.jpg and a/1.png"), ("2.png", "b/2.png and c/2.png")):
        with pytest.raises(DataError, match=rf"'{line}' is the name of 2 pictures .*: {found}"):
            listed(tmp_path, [line])
    assert names(listed(tmp_path, ["a/1.png", "b/2"])) == ["a/1.png", "b/2.png"]


def test_lists_that_cannot_be(resisc: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    for file, message in (
        (tmp_path / "empty.txt", "names no picture"),
        (tmp_path / "absent.txt", "is no list of names: .*No such file"),
        (tmp_path, "is no list of names"),
    ):
        with pytest.raises(DataError, match=f"val_list .*{message}"):
            finetune(training(resisc, tmp_path / "run", val_list=str(file)))
    with pytest.raises(DataError, match=r"no val pictures: .*val_list.* or a share \(val_share"):
        finetune(training(resisc, tmp_path / "run", val_list=None))
    with pytest.raises(OptionError, match="give one of the two"):
        finetune(training(resisc, tmp_path / "run", val_share=0.2))
    for place in ("demo", str(resisc / "resisc45-val.txt"), ("a", "b")):
        with pytest.raises(DataError, match="train_list chooses pictures of one folder"):
            open_source(place, split=None, choice=PictureChoice("train_list", "x"))
    assert not (tmp_path / "run").exists()


def test_pictures_in_both_lists_are_told(
    resisc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    val = str(resisc / "resisc45-train.txt")
    finetune(training(resisc, tmp_path / "run", val_list=val, epochs=1))
    assert "warning: 18 of the 18 pictures of --val_list" in capsys.readouterr().out


# -- a share --------------------------------------------------------------------------------------


def shares(data: Path, **changes: Any) -> tuple[list[str], list[str]]:
    made = [
        PictureChoice("val_share", **({"val_share": 0.3} | changes), held_out=held_out)
        for held_out in (False, True)
    ]
    splits = ("train", "val")
    train, val = (names(open_source(data, s, choice=c)) for s, c in zip(splits, made))
    return train, val


def test_a_share_of_each_class_is_held_out_by_the_seed(resisc: Path) -> None:
    data = resisc / "NWPU-RESISC45"
    train, val = shares(data)
    assert len(train) == 3 * 7 and len(val) == 3 * 3 and not set(train) & set(val)
    assert {name.partition("/")[0] for name in val} == set(COLOURS)
    assert shares(data) == (train, val) != shares(data, seed=1)
    train, val = shares(data, file=str(resisc / "resisc45-train.txt"))
    assert len(train) == 3 * 4 and len(val) == 3 * 2
    assert {int(name[-7:-4]) for name in train + val} == set(SPLITS["train"])
    for tiny in (1e-6, 0.999):  # one of each class at least
        train, val = shares(data, val_share=tiny)
        assert sorted(map(len, (train, val))) == [3, 3 * (EACH - 1)]


def test_other_pictures_do_not_change_what_is_held_out(resisc: Path, tmp_path: Path) -> None:
    before = set(shares(resisc / "NWPU-RESISC45", val_share=0.5)[1])
    for name, number in itertools.product(COLOURS, range(1, EACH)):
        path = tmp_path / "data" / name / f"{name}_{number:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    after = set(shares(tmp_path / "data", val_share=0.5)[1])
    gone = {f"{name}/{name}_{EACH:03}.jpg" for name in COLOURS}
    assert len(after - before) <= len(gone) and len(before - after - gone) <= len(COLOURS)


def test_the_run_lists_what_it_held_out(resisc: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    config = training(resisc, output, train_list=None, val_list=None, val_share=0.2, epochs=1)
    finetune(config)
    file = RunFolder.of(output).val_list
    held_out = file.read_text().split()
    assert held_out == shares(resisc / "NWPU-RESISC45", val_share=0.2)[1]
    arguments = {"device": DEVICE, "num_workers": 0, "picture_list": str(file)}
    assert evaluate(EvaluateConfig(str(output), config.data_path, **arguments))["images"] == 6
    (tmp_path / "data" / "val").mkdir(parents=True)
    with pytest.raises(DataError, match=r"val_share 0.2 makes a val split, but there is one"):
        open_source(tmp_path / "data", choice=PictureChoice("val_share", val_share=0.2))
