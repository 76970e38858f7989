"""Runs that are killed, stopped or lack disk space: nothing is lost, and nothing is different."""

from __future__ import annotations

import random
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest

from convmae.weights import checkpoint as checkpoints
from tests.support.training_processes import finish, flags, kill_at, losses, run_here, start
from tests.support.training_runs import DEVICE, folder_of, same, tensors

if TYPE_CHECKING:
    from pathlib import Path

    Options = dict[str, Any]

pytest.importorskip("torchvision")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("crashes") / "data", 24)


@pytest.fixture
def run_options(data: Path) -> Options:
    """16 steps, a checkpoint after every third."""
    return {
        "model": "convmae_tiny",
        "data_path": data,
        "input_size": (32, 48),
        "batch_size": 6,
        "epochs": 4,
        "warmup_epochs": 1,
        "lr": 1e-3,
        "log_every": 1,
        "save_every": 0.75,
        "num_workers": 1,
        "device": DEVICE,
    }


def test_killed_twice_and_resumed_is_the_same_run(run_options: Options, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_here(["pretrain", *flags(**run_options, output_dir=whole)])
    command = ["pretrain", *flags(**run_options, output_dir=parts, resume="auto")]
    steps = sorted(random.Random(time.time_ns()).sample(range(2, 14), 2))
    print("killed at", steps)  # pytest shows it where the test fails
    reached = [kill_at(start(command), parts, step) for step in steps]
    assert reached[-1] < 16
    run_here(command)
    assert len(losses(whole)) == 16
    assert losses(parts) == losses(whole)
    assert same(tensors(parts), tensors(whole))


@pytest.mark.thorough
def test_sigterm_saves_and_exits_0_and_sigint_130(run_options: Options, tmp_path: Path) -> None:
    for number, status in ((signal.SIGTERM, 0), (signal.SIGINT, 130)):
        folder = tmp_path / number.name
        process = start(["pretrain", *flags(**run_options | {"epochs": 400}, output_dir=folder)])
        while not (folder.exists() and losses(folder)) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
        output = finish(process, status)
        assert "interrupted; go on with" in output
        saved = checkpoints.read_training_state(folder)[1]["step"]
        assert saved == losses(folder)[-1][0] < 1600


@pytest.mark.thorough
def test_a_disk_without_space_ends_a_run_with_its_checkpoint_intact(
    run_options: Options, tmp_path: Path
) -> None:
    """The kernel refuses files above a size: the second checkpoint does not fit."""
    import subprocess
    import sys

    from tests.support.training_processes import ENVIRONMENT

    folder = tmp_path / "run"
    run_here(["pretrain", *flags(**run_options | {"epochs": 1}, output_dir=folder)])
    before = tensors(folder)
    limited = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))\n"
        "from convmae.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = ["pretrain", *flags(**run_options, output_dir=folder, resume="auto")]
    done = subprocess.run(
        [sys.executable, "-c", limited, *command],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr
    assert "could not be written" in done.stderr and "intact" in done.stderr
    assert "Traceback" not in done.stderr
    assert same(tensors(folder), before)
    assert checkpoints.read_training_state(folder)[1]["step"] == 4


@pytest.mark.thorough
def test_ends_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    """A few of those that `python -m tests.support.endurance` tries."""
    from tests.support.endurance import SIGNALS, endure

    seed = time.time_ns() % 10**6
    print("seed", seed)  # pytest shows it where the test fails
    ends = ["SIGKILL", *random.Random(seed).sample(SIGNALS, 1)]
    assert endure(tmp_path, ends, seed, epochs=4) == []
