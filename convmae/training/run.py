"""A whole run, of any task: checks, log, loop and the last pictures."""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from convmae.config import config_to_mapping
from convmae.data import DataError
from convmae.records.folder import RunFolder
from convmae.records.log import RunLog, read_log
from convmae.records.pictures import loss_picture
from convmae.records.report import write_report
from convmae.records.unreadable import UnreadableTally
from convmae.training.diagnosis import what_is_left
from convmae.training.distributed import join
from convmae.training.interrupts import Interrupts
from convmae.training.loop import train
from convmae.training.machine import machine_info
from convmae.training.setup import prepare
from convmae.training.state import Run, TrainingError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from convmae.config import RunConfig
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
        evaluation: the last evaluation: `acc1`, `acc5` (per cent) and `loss`; empty without one.
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
        lines = [
            f"{self.steps} steps, {self.epochs:.2f} epochs in {self.output_dir}: loss "
            f"{self.first_loss:.4f} -> {self.last_loss:.4f}, {self.images_per_s:.1f} images/s "
            f"over {self.seconds:.0f} s"
        ]
        if self.evaluation:
            acc1, acc5 = self.evaluation["acc1"], self.evaluation["acc5"]
            lines.append(f"accuracy {acc1:.2f} % (best of 5: {acc5:.2f} %)")
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
            print(self)
            if self.interrupted:
                print(f"interrupted; go on with --output_dir {self.output_dir} --resume auto")
            else:
                print("see " + " and ".join(map(str, results)))
        return INTERRUPTED if self.signal == signal.SIGINT else 0


def run_task(config: RunConfig, task: Task) -> RunSummary:
    """Trains as `config` says; the commands' functions describe what it leaves and raises."""
    config.validate()
    with join(config.device, config.strategy) as world:
        run, notes = prepare(config, task, world)
        world.share(None)  # nobody writes before everybody has checked
        if world.main:
            run.folder.path.mkdir(parents=True, exist_ok=True)
            run.folder.write_options(config_to_mapping(config))
            _write_environment(run, task.command)
        log = RunLog(
            run.folder,
            run.step,
            run.total_steps,
            run.images_per_step,
            enabled=world.main,
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
            with Interrupts() as interrupts, _failure_noted(run, log):
                ended_by = train(run, task, log, tally, interrupts)
            if ended_by is not None:
                log.write({"event": "interrupted", "step": run.step})
            return _finish(run, log, tally, began_at, ended_by)
        finally:
            log.close()


@contextmanager
def _failure_noted(run: Run, log: RunLog) -> Iterator[None]:
    """Notes in log and report why a run failed; a log that cannot be written is a TrainingError."""
    try:
        yield
    except OSError as error:
        raise TrainingError(f"the run cannot go on: {error}; {what_is_left(run)}") from error
    except (DataError, TrainingError) as error:
        with suppress(OSError):
            log.write({"event": "failed", "step": run.step, "reason": str(error)})
            if run.world.main:
                write_report(run.folder)
        raise


def _write_environment(run: Run, command: str) -> None:
    """`environment.json`: versions, devices and processes, as text."""
    world = run.world
    entries = (
        {"command": command}
        | machine_info()
        | {
            "device": str(world.device),
            "processes": f"{world.size} ({world.strategy})",
            "arithmetic": str(run.dtype).removeprefix("torch."),
        }
    )
    run.folder.write_environment(entries)


def _finish(
    run: Run, log: RunLog, tally: UnreadableTally, began_at: int, ended_by: int | None
) -> RunSummary:
    entries = read_log(run.folder) if run.world.main else []
    losses = [entry for entry in entries if "loss" in entry and "event" not in entry]
    if losses:
        loss_picture(losses, run.folder.loss_picture)
    if run.world.main:
        write_report(run.folder)
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
    return {name: entry[name] for name in ("acc1", "acc5", "loss") if name in entry}
