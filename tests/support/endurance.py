"""Ends a training again and again at random moments, goes on each time, and compares to the bit.

    python -m tests.support.endurance --kills 16 --signals 40

prints a line for every end and how many of them were as they should be. The run saves after every
second step, so that many of the ends fall into a save.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convmae.config import WeightsError
from convmae.records.folder import RunFolder
from convmae.weights.checkpoint import read_training_state
from tests.support.training_processes import flags, losses, run_here, start
from tests.support.training_runs import DEVICE, folder_of, same, tensors

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Sequence

SIGNALS = ("SIGHUP", "SIGUSR1", "SIGTERM")
EPOCHS = 10  # of 4 steps
SETUP_SHARE = 0.2  # of the ends that come at any time after the start, in imports and setup too


@dataclass
class Endurance:
    """A run that is never interrupted, and one that is: runs in `folder`, of random pictures."""

    folder: Path
    random: random.Random
    epochs: int = EPOCHS

    def __post_init__(self) -> None:
        self.runs = 0
        self.whole = self.folder / "whole"
        self.options: dict[str, Any] = {
            "model": "convmae_tiny",
            "data_path": folder_of(self.folder / "data", 24),
            "input_size": (32, 48),
            "batch_size": 6,
            "epochs": self.epochs,
            "warmup_epochs": 1,
            "lr": 1e-3,
            "log_every": 1,
            "save_every": 0.5,
            "num_workers": 1,
            "device": DEVICE,
        }
        run_here(["pretrain", *flags(**self.options, output_dir=self.whole)])
        self.wanted = losses(self.whole)
        self._new_run()

    def _new_run(self) -> None:
        self.runs += 1
        self.parts = self.folder / f"parts-{self.runs}"

    def _start(self) -> subprocess.Popen[str]:
        return start(["pretrain", *flags(**self.options, output_dir=self.parts, resume="auto")])

    def end(self, name: str) -> tuple[str, str]:
        """Goes on, and ends the run by a signal; at which step it ended, and what was wrong."""
        while True:
            process = self._start()
            self._wait(process)
            if process.poll() is None:
                break
            problem = self.finish(process)  # it reached its end first: the same again, in a new run
            if problem:
                return "end", problem
        process.send_signal(getattr(signal, name))
        output, _ = process.communicate(timeout=300)
        found = losses(self.parts) if self.parts.exists() else []
        return f"step {found[-1][0] if found else 0}", self._problem(name, process, output, found)

    def _wait(self, process: subprocess.Popen[str]) -> None:
        """Until a random moment: mostly a while after the first step that this process logs."""
        if self.random.random() < SETUP_SHARE:
            time.sleep(self.random.uniform(0, 5))
            return
        before = RunFolder.of(self.parts).log
        written = before.stat().st_mtime_ns if before.exists() else 0
        while process.poll() is None:
            if before.exists() and before.stat().st_mtime_ns > written and losses(self.parts):
                break
            time.sleep(0.005)
        time.sleep(self.random.uniform(0, 1.5))

    def _problem(
        self, name: str, process: subprocess.Popen[str], output: str, found: list[Any]
    ) -> str:
        """What is wrong with an end and what it left; nothing if it is empty."""
        number = getattr(signal, name)
        allowed = (-number,) if name == "SIGKILL" else (0, -number)  # before it is caught: -number
        if process.returncode not in allowed or "Traceback" in output:
            return f"status {process.returncode}: {output[-2000:]}"
        if found != self.wanted[: len(found)]:
            return "the losses differ from those of the run that nobody interrupted"
        if not RunFolder.of(self.parts).has_checkpoint:
            return ""
        try:
            step = read_training_state(self.parts)[1]["step"]
        except WeightsError as error:
            return f"the checkpoint cannot be read: {error}"
        early = "before the first step" in output  # the log may have lines of a run that was killed
        if process.returncode == 0 and not early and step != found[-1][0]:
            return f"step {step} is saved, but step {found[-1][0]} was logged"
        return ""

    def finish(self, process: subprocess.Popen[str] | None = None) -> str:
        """Lets the run reach its end, and begins a new one; what was wrong."""
        output, _ = (process or self._start()).communicate(timeout=600)
        parts = self.parts
        self._new_run()
        if losses(parts) != self.wanted:
            return f"at its end the losses differ: {output[-2000:]}"
        if not same(tensors(parts), tensors(self.whole)):
            return "at its end the weights differ"
        return ""


def endure(folder: Path, ends: Sequence[str], seed: int, epochs: int = EPOCHS) -> list[str]:
    """Ends runs by the signals of these names, one after the other; what was wrong.

    Every end is printed, and its problem, if it has one, returned; a last one if the run that
    was begun then does not end as one that nobody interrupted.
    """
    endurance = Endurance(folder, random.Random(seed), epochs)
    problems = []
    for count, name in enumerate(ends, 1):
        where, problem = endurance.end(name)
        print(
            f"{count:3} of {len(ends)}  {name:8} {where:9} {problem or 'as it should be'}",
            flush=True,
        )
        problems += [f"{name}: {problem}"] if problem else []
    problem = endurance.finish()
    return problems + ([problem] if problem else [])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs it; returns 0 if all was as it should be."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.endurance", description=__doc__)
    parser.add_argument("--kills", type=int, default=16, help="how often by kill -9")
    parser.add_argument("--signals", type=int, default=40, help=f"how often by {SIGNALS}")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of the run, 4 steps each")
    given = parser.parse_args(arguments)
    chosen = random.Random(given.seed)
    ends = ["SIGKILL"] * given.kills + [chosen.choice(SIGNALS) for _ in range(given.signals)]
    chosen.shuffle(ends)
    print(f"seed {given.seed}")
    with tempfile.TemporaryDirectory() as folder:
        problems = endure(Path(folder), ends, given.seed, given.epochs)
    kills = sum(problem.startswith("SIGKILL") for problem in problems)
    signals = sum(problem.startswith(SIGNALS) for problem in problems)
    print(
        f"{given.kills - kills} of {given.kills} kills, {given.signals - signals} of "
        f"{given.signals} signals: saved and gone on from, the same to the last bit"
    )
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
