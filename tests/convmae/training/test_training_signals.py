"""Signals and dead terminals: whatever asks a run to end, it ends saved, and goes on the same."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from convmae import cli, finetune, pretrain
from convmae.records.report import Report
from convmae.training import interrupts, saving, task
from tests.convmae.tasks.test_finetuning import evaluations, finetuning
from tests.support.training_processes import ENVIRONMENT, flags, losses
from tests.support.training_runs import (
    call_in_step,
    curve,
    interrupt_after,
    options,
    same,
    tensors,
)

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("torchvision")
pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="Windows has other signals"),
    pytest.mark.thorough(but_every=3),
]

NAMES = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")


@pytest.fixture(scope="module")
def whole(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    pretrain(options(pictures, folder))
    return folder


@pytest.fixture
def default_signals():
    """As in a process of its own: nothing ignored, nothing caught."""
    before = {name: signal.getsignal(getattr(signal, name)) for name in NAMES}
    for name in NAMES:
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    yield
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize("name", NAMES)
def test_a_signal_ends_the_step_saves_and_the_run_goes_on_the_same(
    pictures: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config, number = options(pictures, tmp_path / "run"), getattr(signal, name)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4, number)
        summary = pretrain(config)
    assert (summary.steps, summary.signal) == (4, number)
    assert signal.getsignal(number) is signal.SIG_DFL
    assert summary.report() == 0
    summary = pretrain(dataclasses.replace(config, resume="auto"))
    assert (summary.steps, summary.interrupted) == (6, False)
    assert curve(tmp_path / "run") == curve(whole)
    assert same(tensors(tmp_path / "run"), tensors(whole))


@pytest.mark.usefixtures("default_signals")
def test_what_was_ignored_or_caught_before_stays_so(
    pictures: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`nohup` ignores SIGHUP; a scheduler's plugin may catch SIGUSR1 itself."""
    caught: list[int] = []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, lambda number, frame: caught.append(number))

    def send() -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGUSR1)

    call_in_step(monkeypatch, 2, send)
    summary = pretrain(options(pictures, tmp_path / "run"))
    assert (summary.steps, summary.interrupted) == (6, False)
    assert caught == [signal.SIGUSR1]
    assert same(tensors(tmp_path / "run"), tensors(whole))


@pytest.mark.usefixtures("default_signals")
def test_several_signals_at_once_are_one_and_a_second_ctrl_c_is_obeyed(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def send() -> None:
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        call_in_step(patch, 3, send)
        summary = pretrain(options(pictures, tmp_path / "run"))
    assert (summary.steps, summary.signal) == (3, signal.SIGHUP)
    monkeypatch.setattr(interrupts, "INSISTS_AFTER", 0.0)
    call_in_step(monkeypatch, 1, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in "ab"])
    with pytest.raises(KeyboardInterrupt):
        pretrain(options(pictures, tmp_path / "again"))


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 0), ("SIGUSR1", 0), ("SIGINT", 130)])
def test_before_the_first_step_a_signal_acts_at_once_and_leaves_nothing(
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    status: int,
) -> None:
    open_source = task.open_source

    def slowly(*args: Any, **more: Any) -> Any:
        os.kill(os.getpid(), getattr(signal, name))
        return open_source(*args, **more)

    monkeypatch.setattr(task, "open_source", slowly)
    config = options(pictures, tmp_path / "new" / "run")
    monkeypatch.setattr(cli, "_parse", lambda arguments: config)
    assert cli.main(["pretrain"]) == status
    assert f"interrupted by {name}, before the first step" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("default_signals")
def test_a_signal_in_a_save_or_in_the_report_cuts_nothing(
    pictures: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, report = saving.save_checkpoint, Report.write

    def saved(*args: Any, **more: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return save(*args, **more)

    def reported(*args: Any, **more: Any) -> Any:
        os.kill(os.getpid(), signal.SIGHUP)
        return report(*args, **more)

    config = options(pictures, tmp_path / "run", save_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(saving, "save_checkpoint", saved)
        assert pretrain(config).steps == 4  # one step after the save that was not cut
    with monkeypatch.context() as patch:
        patch.setattr(Report, "write", reported)
        summary = pretrain(dataclasses.replace(config, resume="auto"))
    assert (summary.steps, summary.interrupted) == (6, False)
    assert same(tensors(tmp_path / "run"), tensors(whole))
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.thorough
@pytest.mark.usefixtures("default_signals")
def test_an_evaluation_that_is_due_is_done_after_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in that evaluation, the run makes up for it when it goes on."""
    from convmae.tasks import classify

    finetune(finetuning(tmp_path / "whole"))
    accuracy = classify.accuracy

    def dies(*args: Any) -> Any:
        raise MemoryError("stands for kill -9")

    config = finetuning(tmp_path / "run", save_every=100)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3, signal.SIGUSR1)  # the last step of an epoch
        patch.setattr(classify, "accuracy", dies)
        with pytest.raises(MemoryError):
            finetune(config)
    assert evaluations(tmp_path / "run") == []
    assert classify.accuracy is accuracy
    finetune(dataclasses.replace(config, resume="auto"))
    assert len(evaluations(tmp_path / "run")) == 2
    assert evaluations(tmp_path / "run") == evaluations(tmp_path / "whole")
    assert same(tensors(tmp_path / "run"), tensors(tmp_path / "whole"))
    assert same(tensors(tmp_path / "run" / "best"), tensors(tmp_path / "whole" / "best"))


@pytest.mark.thorough
def test_a_terminal_that_goes_away_does_not_end_a_run(pictures: Path, tmp_path: Path) -> None:
    """stdout and stderr are a terminal that is closed as soon as the run trains."""
    import pty

    ours, theirs = pty.openpty()
    config = dataclasses.asdict(options(pictures, tmp_path / "run", epochs=40))
    command = ["pretrain", *flags(**{k: v for k, v in config.items() if v is not None})]
    process = subprocess.Popen(
        [sys.executable, "-m", "convmae", *command],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    os.close(theirs)
    while not (tmp_path / "run" / "log.txt").exists() or not losses(tmp_path / "run"):
        os.read(ours, 4096)
        assert process.poll() is None
    os.close(ours)
    assert process.wait(timeout=300) == 0
    assert losses(tmp_path / "run")[-1][0] == 120
    assert (tmp_path / "run" / "report.html").is_file()
