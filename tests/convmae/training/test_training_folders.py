"""The folder of a run: for one process at a time, deleted in the middle, or impossible."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from convmae import OptionError, TrainingError, cli, pretrain
from convmae.records import log as logs
from convmae.records.folder import RunFolder
from convmae.training.lock import RunLock
from convmae.weights.checkpoint import read_training_state
from tests.support.training_processes import children, cmdline, finish, flags, losses, start
from tests.support.training_runs import DEVICE, call_in_step, curve, options, same, tensors

pytest.importorskip("torchvision")


def begin(pictures: Path, folder: Path, **changes: Any) -> subprocess.Popen[str]:
    """A long run in a process of its own, which has taken its first step."""
    given = {"model": "convmae_tiny", "data_path": pictures, "input_size": (32, 48)}
    given |= {"batch_size": 4, "epochs": 4000, "warmup_epochs": 1, "log_every": 1}
    given |= {"save_every": 0.4, "num_workers": 0, "device": DEVICE, "output_dir": folder}
    process = start(["pretrain", *flags(**given | changes)])
    until = time.monotonic() + 120
    while not (folder.exists() and losses(folder)) and time.monotonic() < until:
        time.sleep(0.02)
    return process


# -- one process at a time ------------------------------------------------------------------------


def test_a_second_run_is_refused_and_the_first_is_unharmed(pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = begin(pictures, folder)
    try:
        for changes in ({}, {"resume": "auto"}):
            with pytest.raises(OptionError) as refusal:
                pretrain(options(pictures, folder, **changes))
            message = str(refusal.value)
            assert f"in use by process {first.pid} on {socket.gethostname()}, since 20" in message
        command = ["--data_path", str(pictures), "--output_dir", str(tmp_path / "link")]
        (tmp_path / "link").symlink_to(folder)
        assert cli.main(["linprobe", *command]) == 2
    finally:
        first.send_signal(signal.SIGTERM)
        finish(first)
    entries = logs.read_log(folder)
    assert {e["event"] for e in entries if "event" in e} == {"interrupted"}
    steps = [point[0] for point in losses(folder)]
    assert steps == list(range(1, len(steps) + 1))
    assert read_training_state(folder)[1]["step"] == steps[-1]
    assert not (folder / "run.lock").exists()


@pytest.mark.thorough
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")
def test_a_loading_process_that_outlives_its_parent_holds_no_lock(
    pictures: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = begin(pictures, folder, num_workers=1)
    loading = [pid for pid in children(process.pid) if b"convmae" in cmdline(pid)]
    assert loading
    for pid in loading:
        os.kill(pid, signal.SIGSTOP)
    try:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert all(b"convmae" in cmdline(pid) for pid in loading)  # stopped, but there
        lock = RunLock(RunFolder.of(folder))
        lock.acquire()
        assert lock.problem is None
        assert json.loads((folder / "run.lock").read_text())["pid"] == os.getpid()
        lock.release()
    finally:
        for pid in loading:
            os.kill(pid, signal.SIGKILL)
        process.communicate()
    assert not (folder / "run.lock").exists() and (folder / "log.txt").exists()


def test_a_process_refuses_its_own_second_run(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, refused = tmp_path / "run", []

    def again() -> None:
        with pytest.raises(OptionError, match="in use by another run in this process"):
            pretrain(options(pictures, folder, resume="auto"))
        refused.append(True)

    call_in_step(monkeypatch, 2, again)
    assert pretrain(options(pictures, folder)).steps == 6
    assert refused == [True]
    assert len(curve(folder)) == 6


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_a_note_says_so_and_the_run_goes_on(
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    assert pretrain(options(pictures, tmp_path / "run")).steps == 6
    lines = [line for line in capsys.readouterr().out.splitlines() if "locked" in line]
    assert len(lines) == 1
    assert lines[0].startswith("note: --output_dir") and os.strerror(number) in lines[0]


def test_what_is_refused_later_leaves_no_folder_and_no_lock(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="needs 13 pictures a step"):
        pretrain(options(pictures, tmp_path / "a" / "b", batch_size=13))
    assert not (tmp_path / "a").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(OptionError, match="needs 13 pictures a step"):
        pretrain(options(pictures, tmp_path / "mine", batch_size=13))
    assert list((tmp_path / "mine").iterdir()) == []


# -- deleted in the middle ------------------------------------------------------------------------


def test_a_folder_that_is_deleted_is_made_again_and_nothing_of_the_run_is_lost(
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "parent" / "run"
    pretrain(options(pictures, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        call_in_step(patch, 4, lambda: shutil.rmtree(tmp_path / "parent"))
        pretrain(options(pictures, folder, save_every=1))
    assert "was deleted while the run was going on; it is made again" in capsys.readouterr().out
    assert curve(folder) == curve(tmp_path / "whole")
    assert same(tensors(folder), tensors(tmp_path / "whole"))
    assert RunFolder.of(folder).read_options()["model"] == "convmae_tiny"
    assert RunFolder.of(folder).read_environment()["command"] == "pretrain"
    assert [e["step"] for e in logs.read_log(folder) if e.get("event") == "folder_lost"] == [4]
    assert not (folder / "run.lock").exists()


def test_a_deleted_folder_is_saved_at_once(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only when the next checkpoint is due: the last one is gone."""
    seen: list[int] = []

    def look() -> None:
        seen.append(read_training_state(tmp_path / "run")[1]["step"])

    call_in_step(monkeypatch, 2, lambda: shutil.rmtree(tmp_path / "run"))
    call_in_step(monkeypatch, 3, look)
    pretrain(options(pictures, tmp_path / "run"))
    assert seen == [2]


def test_a_folder_that_cannot_be_made_again_ends_the_run_in_one_line(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace() -> None:
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run").write_text("a file")

    call_in_step(monkeypatch, 2, replace)
    with pytest.raises(TrainingError, match="was deleted, and could not be made again: .*a file"):
        pretrain(options(pictures, tmp_path / "run"))


def test_a_run_does_not_write_into_the_folder_of_its_successor(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holds = (
        "import sys\n"
        "from convmae.records.folder import RunFolder\n"
        "from convmae.training.lock import RunLock\n"
        "lock = RunLock(RunFolder.of(sys.argv[1]))\n"
        "lock.acquire()\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    others: list[subprocess.Popen[str]] = []

    def replace() -> None:
        shutil.rmtree(tmp_path / "run")
        command = [sys.executable, "-c", holds, str(tmp_path / "run")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        others.append(subprocess.Popen(command, text=True, **pipes))
        assert others[0].stdout is not None and others[0].stdout.readline() == "held\n"

    call_in_step(monkeypatch, 2, replace)
    with pytest.raises(TrainingError, match="was deleted, and .* in use by process") as error:
        pretrain(options(pictures, tmp_path / "run"))
    assert f"process {others[0].pid} on" in str(error.value)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.lock"]
    others[0].communicate()


# -- impossible from the start --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "name", "reason"),
    [
        (lambda path: (path / "afile").write_text(""), "afile/x", "afile' is a file, not a folder"),
        (lambda path: (path / "afile").write_text(""), "afile", "afile' is a file, not a folder"),
        (lambda path: None, "x" * 300, "File name too long"),
        (lambda path: None, "a/" * 2500, "File name too long"),
        (lambda path: None, "zero\0byte", "null byte"),
        (lambda path: (path / "link").symlink_to(path / "gone"), "link", "link to '"),
        (lambda path: (path / "link").symlink_to(path / "gone"), "link/x", "link to '"),
        (lambda path: (path / "link").symlink_to(path / "link"), "link", "link to '"),
        (lambda path: (path / "link").symlink_to(path / "link"), "link/x", "Too many levels of"),
        (lambda path: None, "/proc/x", "no folder can be made in /proc"),
        (lambda path: None, "/dev/null/x", "'/dev/null' is a file, not a folder"),
        (lambda path: None, "", "output_dir must not be empty"),
    ],
)
def test_an_impossible_folder_is_refused_with_the_reason_before_work_begins(
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Any,
    name: str,
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("convmae.training.task.open_source", lambda *args, **more: 1 / 0)
    for output in (name, str(tmp_path / name) if name else name):
        with pytest.raises(OptionError) as refusal:
            pretrain(options(pictures, Path("run"), output_dir=output))
        assert reason in str(refusal.value) and "\n" not in str(refusal.value)
        assert str(refusal.value).startswith("output_dir")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_and_a_refused_folder_are_told_before_work_begins(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write

    def full(handle: int, data: bytes) -> int:
        if stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OptionError, match="cannot be written: No space left on device"):
            pretrain(options(pictures, tmp_path / "a" / "run"))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(OptionError, match="cannot be written: no permission in"):
        pretrain(options(pictures, tmp_path / "run"))
