"""One process or two: the same global batch gives the same losses, and checkpoints fit both."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from convmae import PretrainConfig, pretrain
from convmae.records import log as logs
from convmae.weights.checkpoint import read_training_state
from tests.support.paths import FASHION
from tests.support.training_processes import (
    children,
    cmdline,
    finish,
    flags,
    losses,
    run_here,
    start,
)
from tests.support.training_runs import DEVICE, folder_of, tensors

Options = dict[str, Any]

pytest.importorskip("torchvision")
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="two processes need two GPUs"
)


@pytest.fixture(scope="module")
def run_options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    """5 steps of 8 pictures, in two parts each."""
    return {
        "model": "convmae_tiny",
        "data_path": folder_of(tmp_path_factory.mktemp("distributed") / "data", 40),
        "input_size": 32,
        "epochs": 1,
        "warmup_epochs": 1,
        "lr": 1e-3,
        "clip_grad": 1,
        "log_every": 1,
        "accum_iter": 2,
        "num_workers": 0,
        "amp": "float32",
        "device": DEVICE,
    }


@pytest.fixture(scope="module")
def single(run_options: Options, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs in one process."""
    folder = tmp_path_factory.mktemp("single") / "run"
    options = run_options | {"batch_size": 4, "epochs": 2, "output_dir": folder}
    run_here(["pretrain", *flags(**options)])
    return folder


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.thorough(but_every=3)
def test_two_processes_train_as_one_and_one_goes_on_from_two(
    run_options: Options, single: Path, tmp_path: Path, strategy: str
) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    parallel = run_options | {"batch_size": 2, "strategy": strategy}
    finish(start(["pretrain", *flags(**parallel, output_dir=two)], processes=2))
    alone = run_options | {"batch_size": 4, "epochs": 2, "output_dir": one}
    run_here(["pretrain", *flags(**alone, resume=two)])
    wanted = losses(single)
    found = losses(two) + losses(one)
    assert len(found) == 10 and len(losses(two)) == 5
    assert [point[:2] for point in found] == [point[:2] for point in wanted]
    assert [point[2] for point in found] == pytest.approx([point[2] for point in wanted], rel=1e-6)
    assert [point[4] for point in found] == pytest.approx([point[4] for point in wanted], rel=1e-4)
    assert tensors(one).keys() == tensors(single).keys()
    assert (two / "report.html").exists()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.thorough
def test_two_processes_go_on_from_one(
    run_options: Options, single: Path, tmp_path: Path, strategy: str
) -> None:
    folder = tmp_path / "run"
    options = run_options | {"batch_size": 2, "strategy": strategy, "epochs": 3}
    output = finish(
        start(["pretrain", *flags(**options, resume=single, output_dir=folder)], processes=2)
    )
    assert "going on from" in output and len(losses(folder)) == 5
    for tensor in tensors(folder).values():
        assert bool(tensor.isfinite().all())


@pytest.mark.parametrize(
    ("strategy", "changes"),
    [
        ("ddp", {"model": "timm:test_resnet", "method": "spark", "opt": "sgd"}),
        ("fsdp2", {"model": "timm:test_efficientnet", "opt": "lamb", "clip_grad": 0.5}),
    ],
    ids=["ddp-spark-sgd", "fsdp2-fcmae-lamb"],
)
@pytest.mark.thorough
def test_two_processes_share_the_statistics_of_batch_norms(
    run_options: Options, tmp_path: Path, strategy: str, changes: Options
) -> None:
    """Of visible positions in the network, of all in the decoder: as one process of two batches."""
    options = run_options | {"input_size": 64, "decoder_width": 32, "mask_ratio": 0.5} | changes
    options |= {"accum_iter": 1, "warmup_epochs": 0.5}
    one, two = tmp_path / "one", tmp_path / "two"
    alone = options | {"data_path": str(options["data_path"]), "output_dir": str(one)}
    pretrain(PretrainConfig(**alone, batch_size=8))
    parallel = options | {"batch_size": 4, "strategy": strategy}
    output = finish(start(["pretrain", *flags(**parallel, output_dir=two)], processes=2))
    assert "BatchNorms share their statistics over the processes" in output
    wanted, found = losses(one), losses(two)
    assert len(found) == len(wanted) == 5
    assert [p[2] for p in found] == pytest.approx([p[2] for p in wanted], rel=1e-5)
    # Rounding puts a few activations on the other side of their kinks, which norms show first.
    assert [p[4] for p in found] == pytest.approx([p[4] for p in wanted], rel=1e-2)
    weights = tensors(two)
    assert weights.keys() == tensors(one).keys()
    for name, value in tensors(one).items():
        if name.endswith(("running_mean", "running_var")):
            torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("command", "strategy"), [("finetune", "fsdp2"), ("linprobe", "ddp")])
@pytest.mark.thorough
def test_two_processes_classify_as_one(
    run_options: Options, tmp_path: Path, command: str, strategy: str
) -> None:
    """Without what draws or pairs within a process; evaluation has an odd number of pictures."""
    options = run_options | {"model": "convvit_tiny", "data_path": FASHION, "max_samples": 40}
    options |= {"lr": 1e-4 if command == "finetune" else 0.5, "eval_batch_size": 27}
    if command == "finetune":
        options |= {"mixup": 0, "cutmix": 0, "aa": "none", "reprob": 0, "drop_path": 0}
    del options["clip_grad"]
    one, two = tmp_path / "one", tmp_path / "two"
    finish(start([command, *flags(**options, batch_size=4, output_dir=one)]))
    parallel = options | {"batch_size": 2, "strategy": strategy}
    finish(start([command, *flags(**parallel, output_dir=two)], processes=2))
    wanted, found = losses(one), losses(two)
    assert len(found) == 5
    if command == "finetune":  # the BatchNorm of a probe sees the pictures of its own process
        assert [p[2] for p in found] == pytest.approx([p[2] for p in wanted], rel=1e-6)
    figures = [
        [e for e in logs.read_log(folder) if e.get("event") == "evaluation"][-1]
        for folder in (one, two)
    ]
    assert all(0 <= e["acc1"] <= 100 for e in figures)
    if command == "finetune":
        assert figures[1]["loss"] == pytest.approx(figures[0]["loss"], rel=1e-5)
        assert figures[1]["acc1"] == pytest.approx(figures[0]["acc1"])
    assert tensors(two / "best").keys() == tensors(one / "best").keys()


@pytest.mark.thorough
def test_what_does_not_suit_several_processes_is_refused(
    run_options: Options, tmp_path: Path
) -> None:
    options = run_options | {"batch_size": 21, "accum_iter": 1, "output_dir": tmp_path / "run"}
    output = finish(start(["pretrain", *flags(**options)], processes=2), status=1)
    assert "in 2 processes needs 42 pictures a step" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")
def test_a_signal_to_one_process_stops_all_and_a_second_run_is_refused_by_all(
    run_options: Options, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    options = run_options | {"batch_size": 2, "epochs": 4000, "output_dir": folder}
    first = start(["pretrain", *flags(**options)], processes=2)
    while not (folder.exists() and losses(folder)) and first.poll() is None:
        time.sleep(0.02)
    output = finish(start(["pretrain", *flags(**options)], processes=2), status=1)
    workers = [pid for pid in children(first.pid) if b"convmae" in cmdline(pid)]
    assert len(workers) == 2
    for rank in ("", " (process 1)"):
        assert f"convmae: error{rank}: --output_dir '{folder}' is in use by process" in output
    assert "Traceback (most recent call last)" not in output.partition("is in use by")[0]
    os.kill(workers[1], signal.SIGUSR1)
    assert "interrupted; go on with" in finish(first)
    reached = losses(folder)[-1][0]
    assert read_training_state(folder)[1]["step"] == reached
    assert not (folder / "run.lock").exists()


@pytest.mark.thorough
def test_a_loading_process_that_dies_in_one_process_ends_all_saved(
    run_options: Options, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    options = run_options | {"batch_size": 2, "epochs": 4000, "num_workers": 1}
    process = start(["pretrain", *flags(**options, output_dir=folder)], processes=2)
    while not (folder.exists() and losses(folder)) and process.poll() is None:
        time.sleep(0.02)
    second = [pid for pid in children(process.pid) if b"convmae" in cmdline(pid)][1]
    (loading,) = [pid for pid in children(second) if b"convmae" in cmdline(pid)]
    os.kill(loading, signal.SIGKILL)
    output = finish(process, status=1)
    assert "in process 1: a loading process was killed (SIGKILL)" in output
    reached = losses(folder)[-1][0]
    assert f"the state after step {reached} is saved in" in output
    assert read_training_state(folder)[1]["step"] == reached
