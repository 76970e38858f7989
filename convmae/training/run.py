"""A whole run, of any task: checks, log, loop and the last pictures."""

from __future__ import annotations

import math
import os
import signal
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from convmae.config import OptionError, config_to_mapping
from convmae.data import DataError, LoadingError
from convmae.records.folder import RunFolder
from convmae.records.log import RunLog, read_log
from convmae.records.pictures import loss_picture
from convmae.records.scores import SCORES, scores_text
from convmae.records.terminal import say
from convmae.records.unreadable import UnreadableTally
from convmae.records.wording import is_number
from convmae.training.diagnosis import what_is_left
from convmae.training.distributed import join
from convmae.training.interrupts import Interrupts
from convmae.training.lock import RunLock
from convmae.training.loop import train
from convmae.training.saving import write_description
from convmae.training.setup import prepare
from convmae.training.state import Run, TrainingError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from convmae.config import RunConfig
    from convmae.training.distributed import World
    from convmae.training.task import Task

INTERRUPTED = 130  # exit status of a run that Ctrl-C ended


@dataclass
class RunSummary:
    """What a run did: also what the command prints at its end.

    Attributes:
        output_dir, checkpoint: where it left everything, and its last checkpoint.
        steps, epochs: how far it is, with what it went on from.
        first_loss, last_loss: of its log.
        seconds, images_per_s: of this process.
        signal: the signal that ended it early, or None.
        unreadable: path and reason of every picture that could not be read.
        skipped: steps whose loss or gradient was not finite.
        evaluation: the last evaluation: `loss`, and of a classifier `acc1` and `acc5` (per cent;
            the latter of more than 5 classes only), of others what `convmae.records.scores` names;
            empty without one.
    """

    output_dir: Path
    checkpoint: Path
    steps: int
    epochs: float
    first_loss: float
    last_loss: float
    seconds: float
    images_per_s: float
    signal: int | None = None
    unreadable: dict[str, str] = field(default_factory=dict)
    skipped: int = 0
    evaluation: dict[str, float] = field(default_factory=dict)

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended it early."""
        return self.signal is not None

    def __str__(self) -> str:
        log = RunFolder.of(self.output_dir).log.name
        lines = [f"{self.steps} steps, {self.epochs:.2f} epochs in {self.output_dir}"]
        if not math.isnan(self.last_loss):
            lines[0] += (
                f": loss {self.first_loss:.4f} -> {self.last_loss:.4f}, "
                f"{self.images_per_s:.1f} images/s over {self.seconds:.0f} s"
            )
        if self.evaluation:
            by_class = "acc1" in self.evaluation
            lines.append((accuracy_text if by_class else scores_text)(self.evaluation))
        if self.unreadable:
            count = len(self.unreadable)
            lines.append(f"{count} unreadable pictures were skipped (named in {log})")
        if self.skipped:
            lines.append(f"{self.skipped} steps were skipped: not finite (in {log})")
        return "\n".join(lines)

    def report(self, *results: Path) -> int:
        """Prints what the run came to, in the main process; returns the exit status.

        Args:
            results: files of the run that its user will want to see.
        """
        if int(os.environ.get("RANK", "0")) == 0:
            say(self)
            if self.interrupted:
                say(f"interrupted; go on with --output_dir {self.output_dir} --resume auto")
            else:
                say("see " + " and ".join(map(str, results)))
        return INTERRUPTED if self.signal == signal.SIGINT else 0


def accuracy_text(figures: dict[str, float]) -> str:
    """`accuracy 71.50 % (best of 5: 90.00 %)`; the second where there are more than 5 classes."""
    five = f" (best of 5: {figures['acc5']:.2f} %)" if "acc5" in figures else ""
    return f"accuracy {figures['acc1']:.2f} %{five}"


def run_task(config: RunConfig, task: Task) -> RunSummary:
    """Trains as `config` says; the commands' functions describe what it leaves and raises."""
    config.validate()
    config = config.filled()
    with Interrupts() as interrupts, join(config.device, config.strategy) as world:
        if world.parallel:
            interrupts.hold()  # the others would wait for a process that ends alone
        with _locked(RunFolder.of(config.output_dir), world) as lock:
            run, notes = prepare(config, task, world)
            run.lock = lock
            interrupts.hold()
            if lock is not None and lock.problem is not None:
                notes.append(lock.note())
            world.share(None)  # nobody writes before everybody has checked
            with _disk_failures_told(run):
                return _go(run, task, notes, interrupts)


@contextmanager
def _locked(folder: RunFolder, world: World) -> Iterator[RunLock | None]:
    """Keeps the folder for this run; the main process holds the lock, None in the others."""
    lock = RunLock(folder) if world.main else None
    refusal = None
    if lock is not None:
        try:
            lock.acquire()
        except OptionError as error:
            refusal = error.with_flags
    refusal = world.share(refusal)
    if refusal is not None:
        raise OptionError(refusal)
    try:
        yield lock
    finally:
        if lock is not None:
            lock.release()


def _go(run: Run, task: Task, notes: list[str], interrupts: Interrupts) -> RunSummary:
    """Begins the log, trains, and finishes."""
    config = run.config
    if run.world.main:
        write_description(run, task.command)
    log = RunLog(
        run.folder,
        run.step,
        run.total_steps,
        run.images_per_step,
        enabled=run.world.main,
        wandb_project=config.wandb_project if config.log_wandb else None,
        config=config_to_mapping(config),
    )
    try:
        for note in notes:
            log.say(note)
        if run.data_changes is not None:
            message = f"note: {run.data_changes}"
            log.event("data", run.step, message, what=run.data_changes)
        tally = UnreadableTally(run.source, config.max_unreadable)
        tally.report(log, run.step)
        began_at = run.step
        with _failure_noted(run, log):
            ended_by = train(run, task, log, tally, interrupts)
        if ended_by is not None:
            name = signal.Signals(ended_by).name
            log.write({"event": "interrupted", "step": run.step, "signal": name})
        return _finish(run, log, tally, began_at, ended_by)
    finally:
        log.close()


@contextmanager
def _disk_failures_told(run: Run) -> Iterator[None]:
    """Turns what the disk refuses into a `TrainingError`."""
    try:
        yield
    except OSError as error:
        raise TrainingError(f"the run cannot go on: {error}; {what_is_left(run)}") from error


@contextmanager
def _failure_noted(run: Run, log: RunLog) -> Iterator[None]:
    """Notes in log and report why a run failed."""
    try:
        yield
    except (DataError, LoadingError, TrainingError, OSError) as error:
        with suppress(OSError):
            log.write({"event": "failed", "step": run.step, "reason": str(error)})
            if run.lock is not None and not run.lock.lost:  # else it may be another run's folder
                run.report.write()
        raise


def _finish(
    run: Run, log: RunLog, tally: UnreadableTally, began_at: int, ended_by: int | None
) -> RunSummary:
    entries = read_log(run.folder) if run.world.main else []
    losses = [entry for entry in entries if "event" not in entry and is_number(entry.get("loss"))]
    try:
        if losses:
            loss_picture(losses, run.folder.loss_picture)
        if run.world.main:
            run.report.write()
    except OSError as error:  # the checkpoint is there
        log.say(f"warning: {run.folder.report.name} was not written: {error}")
    evaluations: list[dict[str, Any]] = [e for e in entries if e.get("event") == "evaluation"]
    return RunSummary(
        output_dir=run.folder.path,
        checkpoint=run.folder.checkpoint,
        steps=run.step,
        epochs=run.epoch,
        first_loss=losses[0]["loss"] if losses else float("nan"),
        last_loss=losses[-1]["loss"] if losses else float("nan"),
        seconds=log.seconds,
        images_per_s=(run.step - began_at) * run.images_per_step / log.seconds,
        signal=ended_by,
        unreadable=tally.named(),
        skipped=run.skipped,
        evaluation=_numbers(evaluations[-1]) if evaluations else {},
    )


def _numbers(entry: dict[str, Any]) -> dict[str, float]:
    return {name: entry[name] for name in (*SCORES, "loss") if name in entry}
