"""`predict` and `embed` interrupted at any moment, and in several processes: the same bytes."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from convmae import ConvViT, OptionError, WriteError, embed, predict
from convmae.commands import predict as predicting_command
from convmae.records import parts as parts_module
from convmae.records.parts import PART, Parts, PartWriter, Rows, joined
from tests.support.inference_runs import (
    classifier,
    draw,
    embedding,
    predicting,
    pretrained,
)
from tests.support.shard_files import sample, write_shard
from tests.support.training_processes import finish, flags, start

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

pytest.importorskip("tqdm")
COUNT = 90
BROKEN = 13


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(tmp_path_factory.mktemp("classifier") / "run")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ninety pictures, one of which cannot be read."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(COUNT):
        draw(folder / f"{number:03}.png", number)
    (folder / f"{BROKEN:03}.png").write_text("no")
    return folder


def stored(output: Path) -> list[str]:
    folder = Parts.folder_of(output)
    return sorted(n for n in os.listdir(folder) if PART.fullmatch(n)) if folder.is_dir() else []


def command(name: str, config: Any) -> list[str]:
    values = dataclasses.asdict(config)
    values = {k: v for k, v in values.items() if v is not None and v is not False}
    return [name, *flags(**values)]


def kill_when(process: subprocess.Popen[str], output: Path, count: int, number: int) -> None:
    """Sends a signal as soon as `count` parts are stored."""
    deadline = time.monotonic() + 120
    while process.poll() is None and len(stored(output)) < count and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(number)


# -- killed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["predict", "embed"])
@pytest.mark.thorough
def test_killed_at_several_moments_it_goes_on(
    kind: str, tmp_path: Path, model: Path, folder: Path
) -> None:
    ending, make, function = {
        "predict": (".csv", predicting, predict),
        "embed": (".npz", embedding, embed),
    }[kind]
    whole, output = tmp_path / f"whole{ending}", tmp_path / f"killed{ending}"
    function(make(model, folder, output=str(whole)))
    config = make(model, folder, output=str(output), save_every=0.0)
    before = 0
    for more in (1, 4, 6) if kind == "predict" else (3,):
        process = start(command(kind, config))
        kill_when(process, output, before + more, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not output.exists() and before + more <= len(stored(output)) < 23
        before = len(stored(output))
    text = finish(start(command(kind, config)))
    assert f"{COUNT} pictures, 1 of them unreadable" in text and "of them from before" in text
    assert output.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([whole.name, output.name])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.thorough
def test_a_signal_stores_what_was_computed(
    number: int, tmp_path: Path, model: Path, folder: Path
) -> None:
    whole, output = tmp_path / "whole.csv", tmp_path / "out.csv"
    predict(predicting(model, folder, output=str(whole)))
    config = predicting(model, folder, output=str(output), save_every=0.0)
    process = start(command("predict", config))
    kill_when(process, output, 3, number)
    text = finish(process, 128 + number)
    assert "batches are stored in" in text and "the same command goes on from there" in text
    assert not output.exists() and 3 <= len(stored(output)) < 23
    summary = predict(config)
    assert 0 < summary.computed < COUNT
    assert output.read_bytes() == whole.read_bytes()


class Dead(BaseException):
    """What ends a process without a chance to tidy up."""


def test_a_death_while_the_table_is_written(
    tmp_path: Path, model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, output = tmp_path / "whole.csv", tmp_path / "out.csv"
    predict(predicting(model, folder, output=str(whole)))
    config = predicting(model, folder, output=str(output))

    def dies(*arguments: Any) -> None:
        raise Dead

    with monkeypatch.context() as patch:
        patch.setattr(predicting_command, "write_text", dies)
        with pytest.raises(Dead):
            predict(config)
    assert not output.exists() and stored(output)
    with monkeypatch.context() as patch:  # the table is there, its parts are too
        patch.setattr(Parts, "delete", dies)
        with pytest.raises(Dead):
            predict(config)
    assert output.exists() and stored(output)
    summary = predict(config)
    assert summary.computed == 0
    assert output.read_bytes() == whole.read_bytes() and not stored(output)


def test_a_damaged_part_is_computed_again(
    tmp_path: Path, model: Path, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, output = tmp_path / "whole.csv", tmp_path / "out.csv"
    predict(predicting(model, folder, output=str(whole)))
    config = predicting(model, folder, output=str(output), save_every=0.0)
    begin_and_stop(config, 12)
    for how, name in enumerate(stored(output)[:3]):
        path = Parts.folder_of(output) / name
        data = bytearray(path.read_bytes())
        if how == 0:
            del data[len(data) // 2 :]
        elif how == 1:
            data[len(data) // 3] ^= 1
        else:
            data.clear()
        path.write_bytes(bytes(data))
    kept = len(stored(output)) - 3
    capfd.readouterr()
    summary = predict(config)
    assert capfd.readouterr().err.count("was damaged; its rows are computed again") == 3
    assert summary.computed == COUNT - 4 * kept
    assert output.read_bytes() == whole.read_bytes()


def begin_and_stop(config: Any, batches: int) -> None:
    """Runs until `batches` are stored, as if the process died there."""
    write, count = Parts.write, [0]

    def counting(self: Parts, first: int, many: Any) -> None:
        if count[0] == batches:
            raise Dead
        count[0] += 1
        write(self, first, many)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Dead):
        patch.setattr(Parts, "write", counting)
        predict(config)


# -- other options, other weights, other pictures -------------------------------------------------


def test_what_began_otherwise_is_refused(tmp_path: Path, model: Path, folder: Path) -> None:
    output = tmp_path / "out.csv"
    pictures = [draw(tmp_path / "data" / f"{number}.png", number) for number in range(12)]
    config = predicting(model, tmp_path / "data", output=str(output), save_every=0.0)
    begin_and_stop(config, 2)
    before = {name: (Parts.folder_of(output) / name).read_bytes() for name in stored(output)}
    other = classifier(tmp_path / "other", img_size=32, depth=(1, 1, 1))
    for changes, message in (
        ({"batch_size": 8}, "batch_size was 4, is 8"),
        ({"topk": 2}, "topk was 1, is 2"),
        ({"crop_pct": 0.9}, "crop_pct was 0.875, is 0.9"),
        ({"input_size": 64}, r"input_size was \[32, 32\], is \[64, 64\]"),
        ({"amp": "bfloat16"}, "arithmetic was float32, is bfloat16"),
        ({"checkpoint": str(other)}, "weights was [0-9a-f]+, is [0-9a-f]+"),
        ({"data_path": str(folder)}, "pictures was [0-9a-f]+, is [0-9a-f]+"),
    ):
        with pytest.raises(OptionError, match=f"was begun with other options: {message}"):
            predict(dataclasses.replace(config, **changes))
    draw(pictures[3], 99)  # the same name, another picture
    with pytest.raises(OptionError, match=r"pictures was .*overwrite to begin anew"):
        predict(config)
    after = {name: (Parts.folder_of(output) / name).read_bytes() for name in stored(output)}
    assert before == after and len(before) == 2
    summary = predict(dataclasses.replace(config, overwrite=True))
    assert summary.computed == 12
    fresh = dataclasses.replace(config, output=str(tmp_path / "fresh.csv"))
    predict(fresh)
    assert output.read_bytes() == (tmp_path / "fresh.csv").read_bytes()


def test_options_that_change_no_row_may_change(tmp_path: Path, model: Path, folder: Path) -> None:
    output, whole = tmp_path / "out.csv", tmp_path / "whole.csv"
    predict(predicting(model, folder, output=str(whole)))
    config = predicting(model, folder, output=str(output), save_every=0.0)
    begin_and_stop(config, 7)
    changes = {"num_workers": 2, "max_unreadable": 0.5, "save_every": 60.0, "overwrite": True}
    summary = predict(dataclasses.replace(config, **changes))
    assert summary.computed == COUNT - 28
    assert output.read_bytes() == whole.read_bytes()


def test_a_full_disk_keeps_what_was_stored(
    tmp_path: Path, model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, whole = tmp_path / "out.csv", tmp_path / "whole.csv"
    predict(predicting(model, folder, output=str(whole)))
    config = predicting(model, folder, output=str(output), save_every=0.0)
    savez, count = np.savez, [0]

    def full(*arguments: Any, **arrays: Any) -> None:
        count[0] += 1
        if count[0] > 5:
            raise OSError(28, "No space left on device")
        savez(*arguments, **arrays)

    with monkeypatch.context() as patch:
        patch.setattr(parts_module.np, "savez", full)
        with pytest.raises(WriteError, match=r"cannot be written: No space left .*goes on"):
            predict(config)
    assert len(stored(output)) == 5
    assert predict(config).computed == COUNT - 20
    assert output.read_bytes() == whole.read_bytes()


def test_a_folder_of_parts_that_is_deleted(
    tmp_path: Path, model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Parts.write

    def deleting(self: Parts, first: int, many: Any) -> None:
        if first == 3:
            shutil.rmtree(self.folder)
        write(self, first, many)

    monkeypatch.setattr(Parts, "write", deleting)
    with pytest.raises(WriteError, match=r"\.out.csv.parts cannot be written: No such file"):
        predict(predicting(model, folder, output=str(tmp_path / "out.csv"), save_every=0.0))


def test_an_error_says_what_is_stored(
    tmp_path: Path,
    model: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    forward, count = ConvViT.forward, [0]

    def failing(self: Any, images: Any) -> Any:
        count[0] += 1
        if count[0] == 4:
            raise RuntimeError("out of memory")
        return forward(self, images)

    monkeypatch.setattr(ConvViT, "forward", failing)
    config = predicting(model, folder, output=str(tmp_path / "out.csv"))
    with pytest.raises(RuntimeError, match="out of memory"):
        predict(config)
    said = capsys.readouterr().err
    assert "3 of 23 batches are stored in" in said and "goes on from there" in said
    assert predict(config).computed == COUNT - 12


# -- many processes -------------------------------------------------------------------------------


@pytest.mark.thorough
def test_two_processes_write_the_same_rows(tmp_path: Path, model: Path, folder: Path) -> None:
    whole, output = tmp_path / "whole.csv", tmp_path / "out.csv"
    predict(predicting(model, folder, output=str(whole), device="cpu"))
    config = predicting(model, folder, output=str(output), save_every=0.0, device="cpu")
    text = finish(start(command("predict", config), processes=2))
    assert text.count("wrote ") == 1 and f"{COUNT} pictures, 1 of them unreadable" in text
    assert output.read_bytes() == whole.read_bytes()
    output.unlink()
    begin_and_stop(config, 9)
    text = finish(start(command("predict", config), processes=2))
    assert "36 of them from before" in text
    assert output.read_bytes() == whole.read_bytes()
    text = finish(start(command("predict", config), processes=2), 1)  # torchrun's own status
    assert "exists; --overwrite replaces it" in text and "Traceback" not in text.partition("E11")[0]


@pytest.mark.thorough
def test_two_processes_and_shards(tmp_path: Path) -> None:
    for shard in range(3):
        members = [m for i in range(8) for m in sample(8 * shard + i)]
        write_shard(tmp_path / "shards" / f"{shard}.tar", members)
    mae = pretrained(tmp_path / "mae")
    whole, output = tmp_path / "whole.npy", tmp_path / "out.npy"
    embed(embedding(mae, tmp_path / "shards", output=str(whole), batch_size=5, device="cpu"))
    config = embedding(
        mae, tmp_path / "shards", output=str(output), batch_size=5, num_workers=2, device="cpu"
    )
    finish(start(command("embed", config), processes=2))
    assert output.read_bytes() == whole.read_bytes()
    names = output.with_suffix(".csv").read_text().splitlines()
    assert names[1:] == [f"{n // 8}.tar/s{n:03}," for n in range(24)]
    assert names == whole.with_suffix(".csv").read_text().splitlines()


# -- parts by themselves --------------------------------------------------------------------------


def batch_rows(number: int, size: int = 3) -> Rows:
    numbers = np.arange(number * size, (number + 1) * size)
    names = [f"{value} \udcff \u00e9\n" for value in numbers]
    return Rows(names, numbers, ["" for _ in names], {"x": np.outer(numbers, [1.0, 2.0])})


def test_batches_in_any_order_are_read_in_order(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "parts", 9, 3)
    parts.begin({"a": 1})
    writer = PartWriter(parts, 1e9)
    for number in (4, 0, 5, 1, 7, 6, 2):  # runs: 4 to 6, 0 to 2, 7
        writer.add(number, batch_rows(number))
    assert parts.missing() == list(range(9))  # nothing is written yet
    writer.flush()
    assert parts.missing() == [3, 8]
    assert [(first, stop) for first, stop, _ in parts.found()] == [(0, 3), (4, 7), (7, 8)]
    with pytest.raises(WriteError, match="batch 3 of 9 is in none of the parts"):
        list(parts.read())
    parts.write(2, [batch_rows(2), batch_rows(3)])  # of another process: batch 2 is there twice
    parts.write(8, [batch_rows(8)])
    found, wanted = joined(list(parts.read())), joined([batch_rows(n) for n in range(9)])
    assert (found.names, found.reasons) == (wanted.names, wanted.reasons)
    np.testing.assert_array_equal(found.labels, wanted.labels)
    np.testing.assert_array_equal(found.columns["x"], wanted.columns["x"])
    (tmp_path / "parts" / "notes").write_text("somebody's")
    parts.delete()
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["notes"]


def test_parts_are_written_by_rows_bytes_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts_module, "ROWS_AT_MOST", 6)
    parts = Parts(tmp_path / "parts", 9, 3)
    parts.begin({})
    writer = PartWriter(parts, 1e9)
    writer.add(0, batch_rows(0))
    assert not parts.found()
    writer.add(1, batch_rows(1))
    assert [(first, stop) for first, stop, _ in parts.found()] == [(0, 2)]
    monkeypatch.setattr(parts_module, "BYTES_AT_MOST", 40)
    writer.add(2, batch_rows(2))
    assert len(parts.found()) == 2
    monkeypatch.setattr(parts_module, "BYTES_AT_MOST", 1e9)
    writer.add(3, batch_rows(3))
    assert len(parts.found()) == 2
    writer.seconds = 0.0
    writer.add(4, batch_rows(4))
    assert [(first, stop) for first, stop, _ in parts.found()] == [(0, 2), (2, 3), (3, 5)]
