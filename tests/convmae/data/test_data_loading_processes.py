"""Loading processes that die or lack memory: one line with the way out, and nothing is lost."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

from convmae import LinprobeConfig, TrainingError, cli, linprobe, pretrain
from convmae.data import LoadingError, loader
from convmae.data.loader import run_batches, why_loading_failed
from convmae.weights.checkpoint import read_training_state
from tests.convmae.tasks.test_finetuning import SHORT, evaluations
from tests.support.paths import FASHION
from tests.support.training_runs import curve, options, same, tensors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytest.importorskip("torchvision")


def in_loading_process(
    monkeypatch: pytest.MonkeyPatch,
    dataset: type,
    method: str,
    when: Callable[..., bool],
    action: Callable[[], None],
) -> None:
    """Does something in a loading process, before the batches for which `when` holds."""
    original = getattr(dataset, method)

    def patched(self: Any, keys: Any) -> Any:
        if torch.utils.data.get_worker_info() is not None and when(keys):
            action()
        return original(self, keys)

    monkeypatch.setattr(dataset, method, patched)


def die(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGKILL, r"killed \(SIGKILL\), as the system does when memory runs out"),
        (signal.SIGBUS, r"no room in the shared memory /dev/shm \([\d,]+ MiB in all\)"),
        (signal.SIGSEGV, r"was ended \(SIGSEGV\)"),
    ],
)
def test_what_killed_a_loading_process_is_told_with_the_way_out(number: int, reason: str) -> None:
    class Dying(torch.utils.data.Dataset[Any]):
        def __getitems__(self, keys: list[int]) -> Any:
            die(number)()

    with pytest.raises(LoadingError, match=reason) as error:
        list(run_batches(Dying(), [[0]], workers=1))
    message = str(error.value)
    assert "fewer num_workers (now 1)" in message and "\n" not in message
    assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL  # PyTorch's would cut steps in two


def test_a_dead_loading_process_ends_the_run_saved_and_it_goes_on_the_same(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = options(pictures, tmp_path / "run", num_workers=1, epochs=3)
    pretrain(dataclasses.replace(config, output_dir=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        in_loading_process(
            patch,
            loader.PictureDataset,
            "__getitems__",
            lambda keys: keys[0][0] == 2,  # the third epoch
            die(signal.SIGKILL),
        )
        with pytest.raises(TrainingError, match=r"SIGKILL.*num_workers \(now 1\)") as error:
            pretrain(config)
    reached = curve(tmp_path / "run")[-1][0]
    assert 1 <= reached <= 6  # batches on their way may die with the process
    assert f"the state after step {reached} is saved in" in str(error.value)
    assert read_training_state(tmp_path / "run")[1]["step"] == reached
    pretrain(dataclasses.replace(config, resume="auto"))
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    assert same(tensors(tmp_path / "run"), tensors(tmp_path / "whole"))


@pytest.mark.thorough
def test_the_first_part_of_a_step_that_cannot_be_finished_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The BatchNorm of a probe has seen it already."""
    values = SHORT | {"model": "convvit_tiny", "accum_iter": 2, "batch_size": 10}
    config = LinprobeConfig(**values, output_dir=str(tmp_path / "run"))
    linprobe(dataclasses.replace(config, output_dir=str(tmp_path / "whole")))
    original, calls = loader.PictureDataset.__getitems__, [0]

    def lacking(self: Any, keys: Any) -> Any:
        calls[0] += 1
        if calls[0] == 10:
            raise MemoryError
        return original(self, keys)

    with monkeypatch.context() as patch:
        patch.setattr(loader.PictureDataset, "__getitems__", lacking)
        with pytest.raises(TrainingError, match="no memory left.*the state after step 4 is saved"):
            linprobe(config)
    linprobe(dataclasses.replace(config, resume="auto"))
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    assert same(tensors(tmp_path / "run"), tensors(tmp_path / "whole"))


@pytest.mark.thorough
def test_a_dead_loading_process_in_an_evaluation_loses_neither_step_nor_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = SHORT | {"model": "convvit_tiny", "num_workers": 1}
    config = LinprobeConfig(**values, output_dir=str(tmp_path / "run"))
    linprobe(dataclasses.replace(config, output_dir=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        in_loading_process(
            patch, loader.EvaluationDataset, "__getitems__", lambda keys: True, die(signal.SIGKILL)
        )
        with pytest.raises(TrainingError, match=r"SIGKILL.*the state after step 3 is saved"):
            linprobe(config)
    assert evaluations(tmp_path / "run") == []
    linprobe(dataclasses.replace(config, resume="auto"))
    assert len(evaluations(tmp_path / "run")) == 2
    assert evaluations(tmp_path / "run") == evaluations(tmp_path / "whole")
    assert same(tensors(tmp_path / "run"), tensors(tmp_path / "whole"))


@pytest.mark.thorough
def test_other_commands_say_it_in_one_line_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from convmae.data import source

    linprobe(LinprobeConfig(**SHORT, model="convvit_tiny", output_dir=str(tmp_path / "run")))
    for dataset in (source._MapDataset, loader.EvaluationDataset):
        in_loading_process(
            monkeypatch, dataset, "__getitems__", lambda keys: True, die(signal.SIGKILL)
        )
    capsys.readouterr()
    data = ["--data_path", str(FASHION), "--num_workers", "1"]
    for command in (["stats"], ["evaluate", "--checkpoint", str(tmp_path / "run")]):
        assert cli.main([*command, *data]) == 1
        error = capsys.readouterr().err
        assert error.startswith("convmae: error: a loading process was killed (SIGKILL)")
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError("no more"), "no memory left to load pictures"),
        (OSError(12, "Cannot allocate memory"), "no memory left to load pictures"),
        (RuntimeError("can't allocate memory: you tried"), "no memory left to load pictures"),
        (RuntimeError("unable to write to file </torch_1_2>: No space left"), "shared memory"),
        (OSError(24, "Too many open files"), "too many files are open"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("workers", [0, 1])
def test_lack_of_memory_or_files_is_told_as_that(
    error: Exception, reason: str, workers: int
) -> None:
    class Failing(torch.utils.data.Dataset[Any]):
        def __getitems__(self, keys: list[int]) -> Any:
            raise error

    with pytest.raises(LoadingError, match=reason) as told:
        list(run_batches(Failing(), [[0]], workers=workers))
    assert f"num_workers (now {workers})" in str(told.value)


def test_a_loading_process_that_dies_while_it_hands_over_a_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The connection breaks first; what the process died of is known a moment later."""
    dying = torch.multiprocessing.get_context("fork").Process(target=_die_soon)

    def begin(_: object) -> tuple[Any, list[Any]]:
        def broken() -> Any:
            dying.start()
            raise ConnectionResetError(104, "Connection reset by peer")
            yield

        return broken(), [dying]

    monkeypatch.setattr(loader, "_begin", begin)
    with pytest.raises(LoadingError, match=r"killed \(SIGKILL\).*num_workers \(now 1\)"):
        list(run_batches(torch.zeros(1), [[0]], workers=1))


def _die_soon() -> None:
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_fault_of_the_program_is_left_as_it_is() -> None:
    assert why_loading_failed(ConnectionResetError("of a remote file"), [None, 0], 2) is None
    assert why_loading_failed(RuntimeError("shapes differ"), [None, 0], 2) is None

    class Failing(torch.utils.data.Dataset[Any]):
        def __getitems__(self, keys: list[int]) -> Any:
            raise KeyError("a fault")

    with pytest.raises(KeyError, match="a fault"):
        list(run_batches(Failing(), [[0]], workers=1))
