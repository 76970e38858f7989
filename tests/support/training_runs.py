"""Short runs of pretraining on random pictures, for the tests of training."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from convmae import PretrainConfig
from convmae.records import log as logs
from convmae.training import step
from convmae.weights import checkpoint as checkpoints

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("torchvision")

# The tests of training run on a GPU as well: CONVMAE_TEST_DEVICE=cuda.
DEVICE = os.environ.get("CONVMAE_TEST_DEVICE", "cpu")


def folder_of(path: Path, count: int, size: int = 48) -> Path:
    """A folder of `count` random pictures."""
    rng = np.random.default_rng(0)
    path.mkdir(parents=True)
    for index in range(count):
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((size, size)).save(path / f"{index:03}.png")
    return path


def options(pictures: Path, output: Path, **changes: Any) -> PretrainConfig:
    """A run of 2 epochs of 3 steps that takes under a second."""
    values: dict[str, Any] = {
        "model": "convmae_tiny",
        "data_path": str(pictures),
        "output_dir": str(output),
        "input_size": (32, 48),
        "batch_size": 4,
        "epochs": 2,
        "warmup_epochs": 40,
        "lr": 1e-3,
        "log_every": 1,
        "save_every": 100,
        "num_workers": 0,
        "device": DEVICE,
    }
    return PretrainConfig(**(values | changes))


def curve(folder: Path) -> list[tuple[Any, ...]]:
    """What a resumed run must repeat to the last bit."""
    entries = [e for e in logs.read_log(folder) if "loss" in e and "event" not in e]
    return [(entry["step"], entry["epoch"], entry["loss"], entry["lr"]) for entry in entries]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoints.open_weights(folder).state


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def interrupt_after(
    monkeypatch: pytest.MonkeyPatch, steps: int, number: int = signal.SIGINT
) -> None:
    """Sends this process a signal in the middle of step `steps` (from 1)."""
    call_in_step(monkeypatch, steps, lambda: os.kill(os.getpid(), number))


def call_in_step(
    monkeypatch: pytest.MonkeyPatch, steps: int, function: Callable[[], object]
) -> None:
    """Calls a function in the middle of step `steps` (from 1)."""
    backward, count = step.backward, [0]

    def counting(*args: Any) -> torch.Tensor:
        count[0] += 1
        if count[0] == steps:
            function()
        return backward(*args)

    monkeypatch.setattr(step, "backward", counting)
