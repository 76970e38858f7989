"""The folder of a run: each name in one place, files replaced whole, traces of another run."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

import pytest

from convmae import OptionError
from convmae.records import trackers
from convmae.records.folder import RunFolder
from tests.support.paths import ROOT

NAMES = [
    *("run.lock", "log.txt", "args.yaml", "environment.json", "wandb_id.txt"),
    *("report.html", "loss.png", "tensorboard", "val_list.txt"),
]
# Beside records/folder.py: a help text.
ALSO_NAMED = {"args.yaml": ["cli.py"]}


def refuse(*args: Any) -> None:
    raise OSError(28, "No space left on device")


# -- names ----------------------------------------------------------------------------------------


def code_strings(file: Path) -> list[str]:
    """The string literals of a file; strings that stand alone, as docstrings do, are left out."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    strings = (node for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return [s.value for s in strings if isinstance(s.value, str) and id(s) not in alone]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_typed_in_one_file(name: str) -> None:
    package = ROOT / "convmae"
    whole = "." not in name  # "tensorboard" is a word of other strings too
    named = [
        file.relative_to(package).as_posix()
        for file in sorted(package.rglob("*.py"))
        if any(text == name if whole else name in text for text in code_strings(file))
    ]
    assert sorted(named) == sorted([*ALSO_NAMED.get(name, []), "records/folder.py"])


def test_paths_are_in_the_folder_and_differ(tmp_path: Path) -> None:
    folder = RunFolder.of(tmp_path)
    properties = [n for n, value in vars(RunFolder).items() if isinstance(value, property)]
    paths = [value for n in properties if isinstance(value := getattr(folder, n), Path)]
    assert len(paths) == 14 and len(set(paths)) == len(paths)
    assert all(path.parent == tmp_path for path in paths)
    assert RunFolder.of(folder) is folder and str(folder) == str(tmp_path)
    assert RunFolder.of("~/run").path == Path.home() / "run"


def test_step_pictures_are_in_the_order_of_steps(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.step_pictures() == []
    steps = [123456789, 5, 20]  # the first has more digits than names are filled up to
    folder.step_picture_folder.mkdir()
    for step in steps:
        folder.step_picture(step).touch()
    for other in ("step-x.png", "step-7.jpg", ".new.step-00000008.png", "notes.png"):
        (folder.step_picture_folder / other).touch()
    assert folder.step_pictures() == [(step, folder.step_picture(step)) for step in sorted(steps)]


# -- another run in it ----------------------------------------------------------------------------


@pytest.mark.parametrize("left", ["checkpoint", ".checkpoint.old"])
def test_a_checkpoint_counts_while_it_is_replaced(tmp_path: Path, left: str) -> None:
    folder = RunFolder(tmp_path)
    assert not folder.has_checkpoint and folder.traces() == []
    (tmp_path / left).mkdir()
    folder.log.touch()
    folder.report.touch()  # can be written of any folder: no trace
    assert folder.has_checkpoint and folder.traces() == ["log.txt", left]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "run"
    file.touch()
    with pytest.raises(OptionError, match="^output_dir .*: '.*run' is a file, not a folder"):
        RunFolder(file).check_writable()


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = tmp_path / "new" / "run"
    RunFolder(wanted).check_writable()
    assert not wanted.parent.exists()  # a check writes nothing
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(OptionError, match="cannot be written: no permission in ") as caught:
        RunFolder(wanted).check_writable()
    assert str(caught.value).endswith(repr(str(tmp_path)))


# -- options and environment ----------------------------------------------------------------------


def test_options_and_environment_are_read_back(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    options = {"model": "convmae_tiny", "epochs": 3, "mean": [0.5, 0.25], "lr": None}
    folder.write_options(options)
    folder.write_environment({"command": "pretrain", "device": "cpu"})
    assert folder.read_options() == options and list(folder.read_options()) == list(options)
    assert folder.read_environment() == {"command": "pretrain", "device": "cpu"}


@pytest.mark.parametrize(
    "content", [b"[1", b"[1, 2]", b"\xff", b"{: :", b"", b"[" * 100_000], ids=range(6)
)
def test_what_cannot_be_read_is_empty(tmp_path: Path, content: bytes) -> None:
    folder = RunFolder(tmp_path)
    assert folder.read_options() == {} and folder.read_environment() == {}
    folder.options.write_bytes(content)
    folder.environment.write_bytes(content)
    assert folder.read_options() == {} and folder.read_environment() == {}


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_disk_that_refuses_leaves_the_old_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    folder = RunFolder(tmp_path)
    folder.write_options({"epochs": 3})
    folder.write_environment({"command": "pretrain"})
    monkeypatch.setattr(os, where, refuse)
    with pytest.raises(OSError, match="No space left"):
        folder.write_options({"epochs": 4})
    with pytest.raises(OSError, match="No space left"):
        folder.write_environment({"command": "probe"})
    assert folder.read_options() == {"epochs": 3}
    assert folder.read_environment() == {"command": "pretrain"}
    assert sorted(tmp_path.iterdir()) == sorted([folder.options, folder.environment])


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_disk_that_refuses_leaves_no_empty_id_of_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """An empty one would be taken for the run's id when it goes on."""

    class Package:
        class Settings:
            model_fields = ("finish_timeout",)

    monkeypatch.setattr(trackers, "import_wandb", Package)
    monkeypatch.setattr(os, where, refuse)
    with pytest.raises(OSError, match="No space left"):
        trackers.WandB(RunFolder(tmp_path), "project", None)
    assert list(tmp_path.iterdir()) == []
