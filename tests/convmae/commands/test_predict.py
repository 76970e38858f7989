"""`convmae predict`: the right values from every kind of input, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import convmae
from convmae import DataError, EvaluateConfig, OptionError, cli, evaluate, predict
from convmae.commands import predict as predicting_command
from convmae.weights.checkpoint import open_weights, save_weights
from tests.support.inference_runs import (
    CLASSES,
    classifier,
    draw,
    plain_logits,
    predicting,
    pretrained,
    table,
)
from tests.support.paths import FASHION
from tests.support.shard_files import write_shard, write_shards
from tests.support.training_runs import DEVICE

pytest.importorskip("tqdm")

pytestmark = pytest.mark.thorough(but_every=3)  # a sample of long sweeps


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(tmp_path_factory.mktemp("classifier") / "run")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven pictures, nested; not in the order of their names on disk."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in (7, 3, 10, 1, 0, 9, 2, 8, 5, 6, 4):
        draw(folder / f"part{number % 3}" / f"{number:02}.png", number)
    return folder


def rows_of(tmp_path: Path, checkpoint: Path, data: Any, **changes: Any) -> list[dict[str, str]]:
    """The rows of a table in CSV that a new run wrote."""
    output = tmp_path / f"{len(list(tmp_path.iterdir()))}.csv"
    predict(predicting(checkpoint, data, output=str(output), **changes))
    return table(output.read_bytes().decode())


# -- values ---------------------------------------------------------------------------------------


def test_values_are_those_of_a_plain_loop(tmp_path: Path, model: Path, folder: Path) -> None:
    paths = sorted(folder.rglob("*.png"))
    probabilities = plain_logits(model, paths).softmax(1)
    best = probabilities.topk(3, dim=1)
    summary = predict(predicting(model, folder, output=str(tmp_path / "out.csv"), topk=3))
    rows = table((tmp_path / "out.csv").read_bytes().decode())
    assert [row["name"] for row in rows] == [p.relative_to(folder).as_posix() for p in paths]
    assert (summary.pictures, summary.unreadable, summary.computed) == (11, 0, 11)
    assert len({row["prediction"] for row in rows}) > 1  # the answers differ
    for row, numbers, values in zip(rows, best.indices.tolist(), best.values.tolist()):
        names = [row[f"prediction{suffix}"] for suffix in ("", "_2", "_3")]
        shares = [float(row[f"probability{suffix}"]) for suffix in ("", "_2", "_3")]
        assert names == [CLASSES[number] for number in numbers]
        assert shares == pytest.approx(values, abs=2e-5)
        assert sum(shares) == pytest.approx(1, abs=3e-6)  # six digits each
        assert row["error"] == ""
    assert "label" not in rows[0]  # the folders are no classes of the model


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_scores_of_every_class_in_every_format(
    kind: str, tmp_path: Path, model: Path, folder: Path
) -> None:
    logits = plain_logits(model, sorted(folder.rglob("*.png")))
    for scores, what, wanted in (
        ("logits", "logit", logits),
        ("probabilities", "probability", logits.softmax(1)),
    ):
        output = tmp_path / f"{scores}.{kind}"
        predict(predicting(model, folder, output=str(output), scores=scores))
        if kind == "parquet":
            records = pytest.importorskip("pyarrow.parquet").read_table(output).to_pylist()
        elif kind == "jsonl":
            records = [json.loads(line) for line in output.read_text().splitlines()]
        else:
            records = table(output.read_bytes().decode())
        columns = [f"{what}:{name}" for name in CLASSES]
        assert list(records[0])[-4:] == [*columns, "error"]
        found = torch.tensor([[float(record[name]) for name in columns] for record in records])
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        assert [record["prediction"] for record in records] == [
            CLASSES[number] for number in wanted.argmax(1).tolist()
        ]


def test_a_checkpoint_without_names_gives_numbers(tmp_path: Path, folder: Path) -> None:
    plain = classifier(tmp_path / "plain", classes=None)
    wanted = plain_logits(plain, sorted(folder.rglob("*.png"))).argmax(1).tolist()
    rows = rows_of(tmp_path, plain, folder)
    assert [row["prediction"] for row in rows] == [str(number) for number in wanted]
    fewer = classifier(tmp_path / "fewer", classes=("cat", "dog"))
    rows = rows_of(tmp_path, fewer, folder)
    assert [row["prediction"] for row in rows] == [("cat", "dog", "2")[n] for n in wanted]


def test_rows_are_the_same_for_any_batch_and_loading(
    tmp_path: Path, model: Path, folder: Path
) -> None:
    options: dict[str, Any] = {"device": "cpu", "amp": "float32"}
    first = rows_of(tmp_path, model, folder, **options)
    for changes in ({"num_workers": 2}, {"save_every": 0.0}):
        assert rows_of(tmp_path, model, folder, **options, **changes) == first, changes
    for size in (1, 5, 64):  # products of other sizes may round otherwise
        rows = rows_of(tmp_path, model, folder, **options, batch_size=size)
        found = [float(row.pop("probability")) for row in rows]
        assert found == pytest.approx([float(row["probability"]) for row in first], abs=2e-5)
        assert [row | {"probability": old["probability"]} for row, old in zip(rows, first)] == first


def test_another_size_of_pictures(tmp_path: Path, model: Path, folder: Path) -> None:
    weights = open_weights(model)
    larger: Any = weights.build_model()
    larger.set_input_size(64)
    save_weights(tmp_path / "larger", larger, weights.model, None, weights.pictures, CLASSES)
    wanted = plain_logits(tmp_path / "larger", sorted(folder.rglob("*.png"))).softmax(1)
    rows = rows_of(tmp_path, model, folder, input_size=64)
    found = [float(row["probability"]) for row in rows]
    assert found == pytest.approx(wanted.max(1).values.tolist(), abs=2e-5)


def test_scores_that_are_not_finite_are_no_prediction(
    tmp_path: Path, model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = convmae.ConvViT.forward

    def broken(self: Any, images: torch.Tensor) -> torch.Tensor:
        logits = forward(self, images).clone()
        logits[1, 2] = float("nan")
        return logits

    good = rows_of(tmp_path, model, folder)
    monkeypatch.setattr(convmae.ConvViT, "forward", broken)
    rows = rows_of(tmp_path, model, folder)
    for place, (row, right) in enumerate(zip(rows, good)):
        if place % 4 == 1:
            assert "not finite" in row["error"] and row["prediction"] == row["probability"] == ""
        else:
            assert row == right


# -- kinds of input -------------------------------------------------------------------------------


def test_class_folders_have_a_column_with_the_true_class(tmp_path: Path, model: Path) -> None:
    data = tmp_path / "data"
    for number in range(6):
        draw(data / ("cat", CLASSES[1])[number % 2] / f"{number}.png", number)
    rows = rows_of(tmp_path, model, data)
    assert [row["label"] for row in rows] == [row["name"].partition("/")[0] for row in rows]
    assert {row["label"] for row in rows} == {"cat", CLASSES[1]}
    draw(data / "bird" / "9.png", 9)  # no class of the model: folders then mean nothing
    assert "label" not in rows_of(tmp_path, model, data)[0]


@pytest.mark.parametrize("size", [None, 64])
def test_the_accuracy_is_what_evaluate_says(tmp_path: Path, model: Path, size: int | None) -> None:
    data = tmp_path / "data"
    for number in range(24):
        draw(data / "val" / CLASSES[number % 3] / f"{number:02}.png", number)
    # In the order of their names, which evaluate takes for that of the model.
    names = tuple(sorted(CLASSES))
    sorted_model = classifier(tmp_path / "model", classes=names)
    (data / "train").symlink_to(data / "val")
    rows = rows_of(tmp_path, sorted_model, data, split="val", input_size=size)
    right = sum(row["label"] == row["prediction"] for row in rows)
    assert 0 < right < len(rows) == 24
    common = {"device": DEVICE, "amp": "float32", "num_workers": 0, "input_size": size}
    result = evaluate(EvaluateConfig(str(sorted_model), str(data), **common))
    assert result["acc1"] == pytest.approx(100 * right / 24)


def test_splits_are_read_alone_or_all_together(tmp_path: Path, model: Path) -> None:
    data = tmp_path / "data"
    for number, split in enumerate(("train", "train", "val")):
        draw(data / split / "cat" / f"{number}.png", number)
    draw(data / "test" / "new.png", 5)
    names = [row["name"] for row in rows_of(tmp_path, model, data)]
    assert names == ["test/new.png", "train/cat/0.png", "train/cat/1.png", "val/cat/2.png"]
    rows = rows_of(tmp_path, model, data, split="val")
    assert [(row["name"], row["label"]) for row in rows] == [("val/cat/2.png", "cat")]
    shutil.rmtree(data / "val")  # then it is test, whose pictures need no class
    rows = rows_of(tmp_path, model, data, split="val")
    assert [row["name"] for row in rows] == ["test/new.png"] and "label" not in rows[0]


def test_one_picture_several_and_a_list(tmp_path: Path, model: Path, folder: Path) -> None:
    by_name = {row["name"]: row for row in rows_of(tmp_path, model, folder)}
    one = folder / "part1" / "01.png"
    (row,) = rows_of(tmp_path, model, one)
    assert row == by_name["part1/01.png"] | {"name": "01.png"}
    rows = rows_of(tmp_path, model, (str(one), str(folder / "part0")))
    assert [row["name"] for row in rows] == [
        str(one),
        *(str(path) for path in sorted((folder / "part0").iterdir())),
    ]
    listed = folder / "wanted.txt"
    listed.write_text(f"part2/05.png\n\n{one}\npart2/02.png\n")
    rows = rows_of(tmp_path, model, listed)
    assert [row["name"] for row in rows] == ["part2/05.png", "part1/01.png", "part2/02.png"]
    assert rows[0] == by_name["part2/05.png"]
    listed.write_text("part2/05.png\nnowhere.png\n")  # a row all the same
    rows = rows_of(tmp_path, model, listed)
    assert [(row["name"], bool(row["error"])) for row in rows] == [
        ("part2/05.png", False),
        ("nowhere.png", True),
    ]
    listed.write_text("nowhere.png\n")
    with pytest.raises(DataError, match=r"none of the 1 files that it names exists, .*nowhere.png"):
        rows_of(tmp_path, model, listed)
    listed.write_text("\n")
    with pytest.raises(DataError, match="names no file; expected a path in each line"):
        rows_of(tmp_path, model, listed)
    with pytest.raises(DataError, match=r"notes.md' is no picture; expected a folder, shards, a"):
        (tmp_path / "notes.md").write_text("x")
        rows_of(tmp_path, model, tmp_path / "notes.md")
    listed.unlink()


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_give_the_names_and_order_of_their_samples(
    workers: int, tmp_path: Path, model: Path
) -> None:
    shards = write_shards(tmp_path / "shards")
    names = [f"shard-{i:06}.tar/s{j:03}" for i, r in enumerate(
        (range(7), range(7, 11), range(11, 20), range(20, 25))) for j in r]  # fmt: skip
    rows = rows_of(tmp_path, model, shards, num_workers=workers, batch_size=3)
    assert [row["name"] for row in rows] == names
    assert not any(row["error"] for row in rows)
    assert "label" not in rows[0]
    one_by_one = tuple(str(path) for path in sorted(shards.glob("*.tar")))
    assert rows_of(tmp_path, model, one_by_one, batch_size=3) == rows
    # Labels that are names of classes of the model: those of the shards are "0", "1" and "2".
    numbered = classifier(tmp_path / "numbered", classes=None)
    rows = rows_of(tmp_path, numbered, shards, num_workers=workers)
    assert [row["label"] for row in rows] == [str(number % 3) for number in range(25)]


def test_shards_are_not_refused_for_labels(tmp_path: Path) -> None:
    from tests.support.shard_files import sample

    members = [m for i in range(6) for m in sample(i, "png", None if i == 4 else i % 3)]
    write_shard(tmp_path / "shards" / "a.tar", members)
    numbered = classifier(tmp_path / "numbered", classes=None)
    rows = rows_of(tmp_path, numbered, tmp_path / "shards")
    assert [row["label"] for row in rows] == ["0", "1", "2", "0", "", "2"]
    assert all(row["prediction"] for row in rows)


def test_damaged_shards_are_named_and_counted(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.support.shard_files import damage

    shards = write_shards(tmp_path / "shards")
    damage(shards / "shard-000001.tar", "cut between samples")
    output = tmp_path / "out.csv"
    config = predicting(model, shards, output=str(output), max_unreadable=0.3)
    assert predicting_command.main(config) == 0
    said = capsys.readouterr()
    assert "1 shards damaged" in said.out and "shard-000001.tar: " in said.err
    assert len(table(output.read_text())) == 23  # two are lost
    config = dataclasses.replace(config, max_unreadable=0.2, overwrite=True)
    assert predicting_command.main(config) == 1
    assert "1 of 4 shards damaged" in capsys.readouterr().err


def test_arrays_of_many_pictures(tmp_path: Path) -> None:
    two = classifier(tmp_path / "two", in_chans=2)
    (tmp_path / "data").mkdir()
    rng = np.random.default_rng(0)
    many = rng.integers(0, 60000, (5, 40, 40, 2)).astype(np.uint16)
    np.save(tmp_path / "data" / "many.npy", many)
    np.save(tmp_path / "data" / "one.npy", many[3])
    rows = rows_of(tmp_path, two, tmp_path / "data")
    assert [row["name"] for row in rows] == [*(f"many.npy[{i}]" for i in range(5)), "one.npy"]
    assert rows[3] == rows[5] | {"name": "many.npy[3]"} != rows[4] | {"name": "many.npy[3]"}
    (row,) = rows_of(tmp_path, two, tmp_path / "data" / "one.npy")
    assert row == rows[5]


def test_idx_files_have_two_splits(tmp_path: Path) -> None:
    grey = classifier(tmp_path / "grey", in_chans=1, num_classes=10, classes=None)
    rows = rows_of(tmp_path, grey, FASHION, split="val", batch_size=64)
    assert [row["name"] for row in rows] == [f"t10k-images-idx3-ubyte[{i}]" for i in range(200)]
    from convmae.data.idx import IdxPhotos

    labels = IdxPhotos(FASHION, "val").labels
    assert labels is not None and [int(row["label"]) for row in rows] == labels.tolist()
    (tmp_path / "idx").mkdir()
    shutil.copy(FASHION / "t10k-images-idx3-ubyte.gz", tmp_path / "idx")
    alone = rows_of(tmp_path, grey, tmp_path / "idx", batch_size=64)
    assert "label" not in alone[0]
    assert [row | {"label": old["label"]} for row, old in zip(alone, rows)] == rows
    with pytest.raises(DataError, match=r"holds the splits train and val .*split"):
        rows_of(tmp_path, grey, FASHION)


# -- unreadable -----------------------------------------------------------------------------------


def test_unreadable_pictures_have_rows_and_a_status(
    tmp_path: Path, model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(shutil.copytree(folder, tmp_path / "data"))
    good = {row["name"]: row for row in rows_of(tmp_path, model, data, device="cpu")}
    (data / "part0" / "00.png").write_text("no picture")
    (data / "part2" / 'a, "b"\n=c.png').write_bytes(b"")
    for allowed, status in ((0.2, 0), (0.1, 1)):
        output = tmp_path / f"{allowed}.csv"
        config = predicting(model, data, output=str(output), max_unreadable=allowed, device="cpu")
        assert predicting_command.main(config) == status
        said = capsys.readouterr()
        assert "12 pictures, 2 of them unreadable" in said.out
        assert ("max_unreadable 0.1 allows" in said.err) == (status == 1)
        assert "unreadable: part0/00.png: not a picture" in said.err
        rows = table(output.read_bytes().decode())
        assert [row["name"] for row in rows] == sorted([*good, 'part2/a, "b"\n=c.png'])
        for row in rows:
            if row["error"]:
                assert row["prediction"] == row["probability"] == ""
            else:
                assert row == good[row["name"]]
        assert sum(1 for row in rows if row["error"]) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes on Linux")
def test_names_that_are_no_utf8(tmp_path: Path, model: Path) -> None:
    draw(tmp_path / "data" / "good.png", 0)
    strange = os.fsencode(tmp_path / "data") + b"/\xff.png"
    os.rename(tmp_path / "data" / "good.png", strange)
    for kind in ("csv", "jsonl"):
        output = tmp_path / f"out.{kind}"
        predict(predicting(model, tmp_path / "data", output=str(output)))
        text = output.read_bytes().decode()
        name = json.loads(text)["name"] if kind == "jsonl" else table(text)[0]["name"]
        assert name == r"\xff.png"


# -- what is refused ------------------------------------------------------------------------------


def test_what_does_not_classify(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(OptionError, match="a ConvMAE, which does not classify; .*finetune"):
        rows_of(tmp_path, pretrained(tmp_path / "mae"), folder)
    headless = classifier(tmp_path / "headless", num_classes=0, classes=None)
    with pytest.raises(OptionError, match="an encoder without a classifier"):
        rows_of(tmp_path, headless, folder)
    with pytest.raises(OptionError, match=r"checkpoint '.*nowhere' does not exist"):
        rows_of(tmp_path, tmp_path / "nowhere", folder)
    many = classifier(tmp_path / "many", classes=("a", "b", "c", "d"))
    with pytest.raises(OptionError, match="names 4 classes, but its model has 3"):
        rows_of(tmp_path, many, folder)
    twice = classifier(tmp_path / "twice", classes=("a", "b", "a"))
    with pytest.raises(OptionError, match="two classes of the name 'a'"):
        rows_of(tmp_path, twice, folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topk": 4}, "topk 4 is more than the 3 classes"),
        ({"topk": 0}, "topk must be a whole number at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"input_size": 30}, "input_size must be multiples of 16"),
        ({"scores": "all"}, "scores must be one of none, probabilities, logits, got 'all'"),
        ({"output": "out.xlsx"}, r"output 'out.xlsx' ends in .xlsx; expected .csv, .parquet"),
        ({"output": "out"}, "ends in no format; expected .csv"),
        ({"output": "nowhere/out.csv"}, "the folder nowhere does not exist"),
        ({"output": None, "format": "parquet"}, "format parquet cannot be printed"),
        ({"data_path": "nowhere"}, "data_path 'nowhere' does not exist"),
        ({"data_path": ()}, "data_path needs at least one file or folder, got none"),
        ({"split": "train"}, "has no train pictures"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
    model: Path,
    folder: Path,
    monkeypatch: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    (folder / "val").mkdir(exist_ok=True)
    config = predicting(model, folder, output="out.csv")
    with pytest.raises((OptionError, DataError), match=message):
        predict(dataclasses.replace(config, **changes))
    (folder / "val").rmdir()
    assert not list(tmp_path.iterdir())


def test_outputs_that_cannot_be(tmp_path: Path, model: Path, folder: Path) -> None:
    def refused(output: str | Path, message: str, **changes: Any) -> None:
        with pytest.raises(OptionError, match=message):
            predict(predicting(model, folder, output=str(output), **changes))

    there = tmp_path / "there.csv"
    there.write_text("mine")
    refused(there, "exists; overwrite replaces it")
    assert there.read_text() == "mine"
    predict(predicting(model, folder, output=str(there), overwrite=True))
    assert len(table(there.read_bytes().decode())) == 11
    refused(folder / "out.csv", "is inside data_path")
    refused(folder / "part1" / "out.csv", "is inside data_path")
    refused(tmp_path, "is a folder", format="csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no picture"):
        predict(predicting(model, tmp_path / "empty", output=str(tmp_path / "a.csv")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "there.csv"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a place where nobody may write")
def test_a_place_where_nothing_can_be_written(model: Path, folder: Path) -> None:
    with pytest.raises(OptionError, match=r"output '/proc/out.csv' cannot be written: "):
        predict(predicting(model, folder, output="/proc/out.csv"))


def test_parquet_without_pyarrow(
    tmp_path: Path, model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(OptionError, match="needs pyarrow: pip install pyarrow"):
        predict(predicting(model, folder, output=str(tmp_path / "out.parquet")))


def test_pictures_of_other_channels(tmp_path: Path, folder: Path) -> None:
    two = classifier(tmp_path / "two", in_chans=2)
    with pytest.raises(OptionError, match="pictures of 3 channels, but the model takes 2"):
        rows_of(tmp_path, two, folder)


# -- the command line -----------------------------------------------------------------------------


def test_the_command_prints_a_table(
    model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", str(folder), "-b", "4", "-j", "0", "--amp", "float32"]
    assert cli.main(["predict", "--checkpoint", str(model), *flags]) == 0
    said = capsys.readouterr()
    rows = table(said.out)
    assert len(rows) == 11 and all(row["prediction"] in CLASSES for row in rows)
    assert "11 pictures, 0 of them unreadable" in said.err
    assert cli.main(["predict", "--checkpoint", str(model), *flags, "--topk", "9"]) == 2
    assert capsys.readouterr().err == (
        f"convmae: error: --topk 9 is more than the 3 classes of --checkpoint '{model}'\n"
    )


@pytest.mark.thorough
def test_a_reader_that_has_seen_enough(tmp_path: Path, model: Path, folder: Path) -> None:
    """`convmae predict ... | head -1` prints no traceback."""
    typed = ["predict", "--checkpoint", str(model), "--data_path", str(folder), "-j", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "convmae", *typed],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait() == 1 and "Error" not in said
    assert not list(tmp_path.glob("convmae-*"))  # the parts are gone
