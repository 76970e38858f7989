"""Runs of the command line in processes of their own: several at once, and killed in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from convmae import cli
from convmae.records import log as logs

if TYPE_CHECKING:
    from collections.abc import Sequence

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def flags(**options: Any) -> list[str]:
    """`lr=1e-3, input_size=(32, 48), pin_mem=False` as they are typed."""
    typed: list[str] = []
    for name, value in options.items():
        if isinstance(value, bool):
            typed.append(f"--{name}" if value else f"--no_{name}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            typed += [f"--{name}", *map(str, values)]
    return typed


def start(command: Sequence[str], processes: int = 1) -> subprocess.Popen[str]:
    """`convmae COMMAND`, by torchrun where `processes` is above 1."""
    launcher = ["-m", "convmae"]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        launcher = [*torchrun, str(processes), *launcher]
    return subprocess.Popen(
        [sys.executable, *launcher, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
    )


def run_here(command: Sequence[str]) -> None:
    """`convmae COMMAND` in this process, with the threads of others: a start takes seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(int(ENVIRONMENT["OMP_NUM_THREADS"]))
    try:
        assert cli.main(command) == 0
    finally:
        torch.set_num_threads(threads)


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    """Waits for the end; the output, if the exit status is the one expected."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == status, output
    return output


def losses(folder: Path) -> list[tuple[Any, ...]]:
    """Everything in the log that must not depend on how often a run was interrupted."""
    return [
        (e["step"], e["epoch"], e["loss"], e["lr"], e["grad_norm"])
        for e in logs.read_log(folder)
        if "loss" in e and "event" not in e
    ]


def kill_at(process: subprocess.Popen[str], folder: Path, step: int) -> int:
    """`kill -9`, as soon as the log shows `step`; the last step that it shows then."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        logged = losses(folder) if folder.exists() else []
        if process.poll() is not None or (logged and logged[-1][0] >= step):
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    return losses(folder)[-1][0]


def children(process: int) -> list[int]:
    """Processes that a process has started, in their order; needs Linux's `/proc`."""
    text = Path(f"/proc/{process}/task/{process}/children").read_text()
    return sorted(int(word) for word in text.split())


def cmdline(process: int) -> bytes:
    """The command of a process; empty of one that has ended."""
    return Path(f"/proc/{process}/cmdline").read_bytes()
