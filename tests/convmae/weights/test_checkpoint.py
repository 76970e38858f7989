"""Checkpoints on a disk that refuses, and checkpoints that were damaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

import convmae
from convmae.config import WeightsError
from convmae.data import Statistics
from convmae.weights import checkpoint as checkpoints
from tests.support.paths import ROOT

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("safetensors")

# The kernel lets no file of this process grow beyond a limit: a write fails as on a full disk.
REFUSED = """
import resource, signal, sys
from pathlib import Path
import torch, convmae
from convmae.data import Statistics
from convmae.weights import checkpoint as checkpoints

run, limit, how, numbers = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
model = convmae.create_model("convmae_tiny", img_size=32)
torch.nn.init.ones_(model.mask_token)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
state = {"step": 2, "optimizer": torch.zeros(numbers)}
try:
    if how == "checkpoint":
        checkpoints.save_checkpoint(run, model, "convmae_tiny", state)
    else:
        checkpoints.save_weights(run / "best", model, "convmae_tiny")
except OSError as error:
    print("refused:", error)
"""


def save(run: Path, step: int) -> convmae.ConvMAE:
    model = convmae.create_model("convmae_tiny", img_size=32)
    checkpoints.save_checkpoint(run, model, "convmae_tiny", {"step": step})
    checkpoints.save_weights(
        run / "best", model, "convmae_tiny", pictures=Statistics((0.5,) * 3, (1.0,) * 3)
    )
    return model


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@pytest.mark.skipif(os.name == "nt", reason="limits of files are Unix's")
@pytest.mark.parametrize(
    ("how", "limit", "numbers", "file"),
    [
        ("checkpoint", 100_000, 10, "model.safetensors"),
        ("checkpoint", 60_000_000, 60_000_000, "training_state.pt"),
        ("best", 100_000, 10, "model.safetensors"),
    ],
)
@pytest.mark.thorough(but_every=5)
def test_a_disk_that_refuses_leaves_the_checkpoint_before(
    tmp_path: Path, how: str, limit: int, numbers: int, file: str
) -> None:
    model = save(tmp_path, 1)
    before = files(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, str(tmp_path), str(limit), how, str(numbers)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused:") and f"{file} could not be written" in done.stdout
    assert files(tmp_path) == before  # nothing half-written is left, either
    weights, state = checkpoints.read_training_state(tmp_path)
    assert state == {"step": 1}
    loaded = checkpoints.load_model(tmp_path / "best")
    for key, value in model.state_dict().items():
        assert torch.equal(weights.state[key], value)
        assert torch.equal(loaded.state_dict()[key], value)


def test_weights_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "plain").touch()
    for name in ("checkpoint/model.safetensors", "checkpoint/training_state.pt"):
        assert (tmp_path / name).stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert files(tmp_path)["best/model.safetensors"]
    mode = (tmp_path / "best/model.safetensors").stat().st_mode
    assert mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.7, 0.999])
def test_files_cut_short(tmp_path: Path, share: float) -> None:
    save(tmp_path, 1)
    state, weights = (
        tmp_path / "checkpoint" / name for name in (checkpoints.STATE, checkpoints.WEIGHTS)
    )
    whole = state.read_bytes()
    state.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(WeightsError, match=r"^/.*training_state.pt is (damaged|empty)"):
        checkpoints.read_training_state(tmp_path)
    whole = weights.read_bytes()
    weights.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(WeightsError, match=r"^/.*model.safetensors is not readable"):
        checkpoints.load_model(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{"config": "{"}, {"config": "[1]"}, {"mean": "oops"}, {"std": '["a"]'}, {"mean": "3"}],
)
def test_damaged_metadata(tmp_path: Path, changes: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "model.safetensors"
    metadata = {"format": "pt", "model": "convmae_tiny", "config": json.dumps({})}
    save_file({"x": torch.ones(1)}, file, metadata=metadata | changes)
    with pytest.raises(WeightsError, match=r"^the metadata of .* are damaged"):
        checkpoints.load_model(file)
    with pytest.raises(WeightsError, match="holds weights only"):
        checkpoints.read_training_state(file)


def test_a_training_state_of_something_else(tmp_path: Path) -> None:
    model = save(tmp_path, 1)
    checkpoints.save_checkpoint(tmp_path, model, "convmae_tiny", [1, 2])  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match="holds a list, expected a training state"):
        checkpoints.read_training_state(tmp_path)
