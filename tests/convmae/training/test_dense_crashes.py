"""Segmenters and detectors killed at any step and resumed: the same losses, the same figures."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any

import pytest

from convmae.records import log as logs
from tests.support.detection_runs import SMALL
from tests.support.label_map_files import ade_layout
from tests.support.object_files import write_shapes
from tests.support.training_processes import flags, kill_at, losses, run_here, start
from tests.support.training_runs import same, tensors

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("torchmetrics")
pytest.importorskip("pycocotools")
STEPS, KILLS = 12, 1
SEGMENTER = {
    **{"model": "convvit_tiny", "head": "light", "head_width": 16, "input_size": 32},
    **{"batch_size": 4, "epochs": 6, "warmup_epochs": 1, "lr": 1e-3, "drop_path": 0.1},
    **{"log_every": 1, "num_workers": 1, "amp": "float32", "device": "cpu"},
    **{"eval_every": 2, "save_every": 0.5},
}
# 8 pictures, two in a batch
DETECTOR = SMALL | {"steps": STEPS, "epochs": 3, "eval_every": 1, "save_every": 0.5}


def figures(folder: Path) -> dict[int, dict[str, float]]:
    """Of every evaluation what does not depend on time, by its step."""
    found = {}
    for entry in logs.read_log(folder):
        if entry.get("event") == "evaluation":
            found[entry["step"]] = {k: v for k, v in entry.items() if k != "seconds"}
    return found


@pytest.mark.parametrize("task", ["segment", "detect"])
@pytest.mark.thorough
def test_killed_and_resumed_is_the_same_run(task: str, tmp_path: Path) -> None:
    make: dict[str, tuple[Any, dict[str, Any]]] = {
        "segment": (ade_layout, SEGMENTER),
        "detect": (write_shapes, DETECTOR),
    }
    write, options = make[task]
    options = options | {"data_path": write(tmp_path / "data", 8, 3)}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_here([task, "train", *flags(**options, output_dir=whole)])
    command = [task, "train", *flags(**options, output_dir=parts, resume="auto")]
    steps = sorted(random.Random(time.time_ns()).sample(range(1, STEPS - 1), KILLS))
    print("killed at", steps)  # pytest shows it where the test fails
    for step in steps:
        kill_at(start(command), parts, step)
    run_here(command)
    assert len(losses(whole)) == STEPS
    assert losses(parts) == losses(whole)
    assert figures(parts) == figures(whole) and STEPS in figures(whole)
    assert same(tensors(parts), tensors(whole))
