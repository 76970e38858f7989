"""The log of a run: log.txt, TensorBoard, Weights & Biases, and what happens when they fail."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convmae import OptionError
from convmae.records import log as logs
from convmae.records import trackers
from convmae.records.log import RunLog, memory_mib, read_log
from tests.support.paths import ROOT

FULL = Path("/dev/full")  # a file on a disk without room


def open_log(folder: Path, first_step: int = 0, **options: Any) -> RunLog:
    return RunLog(folder, first_step, 100, 8, **options)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = loading.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        name: [(scalar.step, round(scalar.value, 4)) for scalar in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


# -- lines ----------------------------------------------------------------------------------------


def test_a_loss_line_has_what_it_was_given(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    more = {"grad_norm": 0.5, "model_images_per_s": 200.0, "bottleneck": "model"}
    line = log.loss(10, 0.5, 1.25, 1e-3, **more, memory_mib=None)
    log.evaluation(10, 0.5, {"acc1": 71.5, "acc5": 90.0, "loss": 1.5})
    log.close()
    assert read_log(tmp_path) == [
        line,
        {"event": "evaluation", "step": 10, "epoch": 0.5, "acc1": 71.5, "acc5": 90.0, "loss": 1.5},
    ]
    assert list(line) == [
        *("step", "epoch", "loss", "lr", "images_per_s"),
        *("grad_norm", "model_images_per_s", "bottleneck", "seconds"),
    ]
    assert scalars(tmp_path) == {
        "train/loss": [(10, 1.25)],
        "train/lr": [(10, 0.001)],
        "train/images_per_s": [(10, pytest.approx(line["images_per_s"], rel=1e-4))],
        "train/grad_norm": [(10, 0.5)],
        "train/model_images_per_s": [(10, 200.0)],
        "eval/acc1": [(10, 71.5)],
        "eval/acc5": [(10, 90.0)],
        "eval/loss": [(10, 1.5)],
    }


def test_the_log_says_what_limits_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = open_log(tmp_path)
    log.loss(10, 0.5, 1.25, 1e-3, bottleneck="input")
    log.loss(20, 1.0, 1.25, 1e-3, bottleneck="model")
    log.evaluation(20, 1.0, {"acc1": 71.5})
    log.close()
    first, second, third = capsys.readouterr().out.splitlines()
    assert "waits for pictures" in first and "waits for pictures" not in second
    assert third == "evaluation after step 20, epoch 1.00:  acc1 71.5"


def test_every_line_is_json_whatever_the_numbers(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.event("nonfinite", 3, "loss", loss=math.nan, grad_norm=math.inf)
    log.close()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    (line,) = (tmp_path / "log.txt").read_text().splitlines()
    wanted = {"event": "nonfinite", "step": 3, "loss": None, "grad_norm": None}
    assert json.loads(line, parse_constant=refuse) == wanted


def test_a_resumed_run_cuts_what_lies_beyond_its_first_step(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    for step in (10, 20, 30):
        log.loss(step, step / 10, 1.0, 1e-3)
    log.close()
    with (tmp_path / "log.txt").open("ab") as file:  # as a kill leaves it
        file.write(b'[1]\n{"step": 40, "lo\xff')
    log = open_log(tmp_path, first_step=20)
    log.loss(30, 3.0, 2.0, 1e-3)
    log.close()
    found = [(e["step"], e.get("loss"), e.get("event")) for e in read_log(tmp_path)]
    assert found == [(10, 1.0, None), (20, 1.0, None), (20, None, "resumed"), (30, 2.0, None)]
    assert scalars(tmp_path)["train/loss"] == [(10, 1.0), (20, 1.0), (30, 2.0)]
    open_log(tmp_path, first_step=100).close()  # all is done: nothing is resumed
    assert read_log(tmp_path)[-1]["step"] == 30


def test_a_disabled_log_writes_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = open_log(tmp_path, first_step=5, enabled=False, wandb_project="none")
    log.say("something")
    log.event("unreadable", 6, "skipped", path="x")
    assert log.loss(10, 0.5, 1.25, 1e-3)["loss"] == 1.25
    log.evaluation(10, 0.5, {"acc1": 1.0})
    log.picture("reconstruction", np.zeros((4, 4, 3), np.uint8), 10)
    log.idle(1.0)
    log.tick()
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_told_with_the_path(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    assert log._file is not None
    log._file.close()
    log._file = FULL.open("wb", buffering=0)
    with pytest.raises(OSError, match="No space left on device: '.*log.txt'"):
        log.loss(10, 0.5, 1.25, 1e-3)
    log.close()


# -- trackers that fail ---------------------------------------------------------------------------


class Broken:
    """A tracker on a full disk; counts how often it is asked."""

    def __init__(self, *args: Any) -> None:
        self.calls = 0

    def fail(self, *args: Any) -> None:
        self.calls += 1
        raise OSError(28, "No space left on device")

    scalars = picture = close = fail


def test_a_tracker_that_fails_is_off_after_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    made: list[Broken] = []
    monkeypatch.setattr(logs, "TensorBoard", lambda *args: made.append(Broken()) or made[-1])
    log = open_log(tmp_path)
    for step in (10, 20):
        log.loss(step, 0.5, 1.25, 1e-3)
        log.picture("reconstruction", np.zeros((4, 4, 3), np.uint8), step)
    log.close()
    assert made[0].calls == 1
    assert capfd.readouterr().err.splitlines() == [
        "warning: TensorBoard is off from here on: OSError: [Errno 28] No space left on device"
    ]
    assert [line["step"] for line in read_log(tmp_path)] == [10, 20]


def test_without_tensorboard_a_run_only_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = open_log(tmp_path)
    log.loss(10, 0.5, 1.25, 1e-3)
    log.close()
    assert capfd.readouterr().err.startswith("warning: TensorBoard is off from here on: ")
    assert len(read_log(tmp_path)) == 1


# -- Weights & Biases -----------------------------------------------------------------------------


def test_wandb_that_is_not_installed_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for missing in (None, type(sys)("wandb")):  # no package; a folder of that name
        monkeypatch.setitem(sys.modules, "wandb", missing)
        with pytest.raises(OptionError, match="^log_wandb needs the package wandb"):
            open_log(tmp_path, wandb_project="project")
        assert list(tmp_path.iterdir()) == []
    open_log(tmp_path).close()  # not asked for, not needed


def test_wandb_that_fails_does_not_stop_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def no_network(*args: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(trackers, "import_wandb", no_network)
    monkeypatch.setattr(logs, "import_wandb", lambda: None)
    log = open_log(tmp_path, wandb_project="project")
    log.loss(10, 0.5, 1.25, 1e-3)
    log.close()
    assert "warning: Weights & Biases is off from here on: ConnectionError: no network" in (
        capfd.readouterr().err
    )
    assert scalars(tmp_path)["train/loss"] == [(10, 1.25)]


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real package, without a network; a resumed run goes on in the same run."""
    pytest.importorskip("wandb")
    for name, value in (("MODE", "offline"), ("SILENT", "true"), ("DISABLE_CODE", "true")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    for name in ("CONFIG_DIR", "CACHE_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / "cache"))
    folder = tmp_path / "run"
    folder.mkdir()
    for first in (0, 10):
        log = open_log(folder, first, wandb_project="convmae-test", config={"epochs": 3})
        log.loss(first + 10, 1.0, 1.25, 1e-3, grad_norm=0.5, bottleneck="model")
        log.evaluation(first + 10, 1.0, {"acc1": 50.0})
        log.picture("reconstruction", np.zeros((4, 4, 3), np.uint8), first + 10)
        log.close()
    name = (folder / "wandb_id.txt").read_text()
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{name}.wandb"] * len(files) and files
    expected = (b"convmae-test", b"train/grad_norm", b"eval/acc1", b"reconstruction")
    for file in files:
        deadline = time.monotonic() + 120  # wandb writes in a process of its own, behind the run
        while any(word not in file.read_bytes() for word in expected):
            assert time.monotonic() < deadline, file.read_bytes()
            time.sleep(0.1)


# -- memory ---------------------------------------------------------------------------------------


MEASURE = """
import numpy, torch
from convmae.records.log import memory_mib
print(memory_mib(torch.device("cpu")))
held = numpy.ones(256 * 2**17)
print(memory_mib(torch.device("cpu")))
"""


@pytest.mark.thorough
def test_peak_memory_on_a_cpu_is_that_of_the_process() -> None:
    pytest.importorskip("resource")
    command = [sys.executable, "-c", MEASURE]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    before, after = map(float, result.stdout.split())
    assert 20 < before < 4096
    assert 128 < after - before < 384


def test_peak_memory_on_a_gpu_is_that_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(
        torch.cuda, "max_memory_allocated", lambda device: asked.append(device) or 3 * 2**20
    )
    assert memory_mib(torch.device("cuda:1")) == 3.0
    assert asked == [torch.device("cuda:1")]
