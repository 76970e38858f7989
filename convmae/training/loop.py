"""The loop that every kind of training shares: steps, skipped steps, logs, evaluations, saves."""

from __future__ import annotations

import math
import signal
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from convmae.data import DataError, LoadingError
from convmae.records.log import memory_mib
from convmae.training.diagnosis import diagnose, what_is_left
from convmae.training.meter import Meter
from convmae.training.saving import restore_folder, save
from convmae.training.state import Run, TrainingError
from convmae.training.step import StepResult, take_step

if TYPE_CHECKING:
    from collections.abc import Iterator

    from convmae.data import Batch
    from convmae.records.log import RunLog
    from convmae.records.unreadable import UnreadableTally
    from convmae.training.interrupts import Interrupts
    from convmae.training.task import Task


def train(
    run: Run, task: Task, log: RunLog, tally: UnreadableTally, interrupts: Interrupts
) -> int | None:
    """Trains to the end, or until a signal; the state is saved in both cases.

    Returns:
        The signal that ended the run before its end, or None.

    Raises:
        TrainingError, convmae.data.DataError: as `pretrain` says.
    """
    try:
        stop = _steps(run, task, log, tally, interrupts)
    except LoadingError as error:
        _save_what_there_is(run, task, log)
        raise TrainingError(f"{error.with_flags} Stopped; {what_is_left(run)}") from error
    except DataError:
        if not run.world.parallel:  # others may not know of it
            _save_what_there_is(run, task, log)
        raise
    return (interrupts.number or signal.SIGTERM) if stop and run.step < run.total_steps else None


def _steps(
    run: Run, task: Task, log: RunLog, tally: UnreadableTally, interrupts: Interrupts
) -> bool:
    """Takes the steps that are left; whether a signal asked to stop."""
    batches = run.world.together(_batches(run, task, log, tally))
    meter = Meter(run.workers)
    if run.evaluation_pending:
        _evaluate(run, task, log)
        save(run, task, log)
    (stop,) = run.world.any(interrupts.asked)
    while run.step < run.total_steps and not stop:
        began = time.perf_counter()
        outcome = take_step(run, task, batches, meter, log)
        stop, lost = run.world.any(interrupts.asked, run.lock is not None and run.lock.lost)
        run.step += 1
        _after(run, task, log, outcome)
        run.evaluation_pending = task.evaluation_due(run)
        meter.stepped += time.perf_counter() - began
        log.tick()
        if lost:
            restore_folder(run, task, log)
        last = run.step == run.total_steps
        whole_window = run.step % run.config.log_every == 0
        if whole_window or last:
            _log(run, log, meter, outcome)
        if whole_window:  # at the last step a part may stay, for a run that goes on later
            run.losses.clear()
        began = time.perf_counter()
        if run.evaluation_pending:
            if stop:  # an evaluation may outlast the patience of who sent the signal
                save(run, task, log)
            _evaluate(run, task, log)
        if run.due(run.config.save_every) or stop or lost:
            save(run, task, log)
        log.idle(time.perf_counter() - began)
    return stop


def _evaluate(run: Run, task: Task, log: RunLog) -> None:
    task.evaluate(run, log)
    run.evaluation_pending = False


def _save_what_there_is(run: Run, task: Task, log: RunLog) -> None:
    """Saves the last whole step, where the checkpoint is older."""
    if run.step > run.saved_step:
        with suppress(DataError, LoadingError):  # of the picture, drawn after the checkpoint
            save(run, task, log)


def _batches(run: Run, task: Task, log: RunLog, tally: UnreadableTally) -> Iterator[Batch]:
    """All batches of this process from the run's present step on; what failed is noted."""
    config, accum = run.config, run.config.accum_iter
    batches = run.source.batches(
        task.transform(config),
        config.batch_size,
        first=run.step * accum,
        last=run.total_steps * accum,
        batches_per_epoch=run.steps_per_epoch * accum,
        seed=config.seed,
        rank=run.world.rank,
        world=run.world.size,
        workers=run.workers,
        pin=config.pin_mem and run.world.device.type == "cuda",
    )
    for batch in batches:
        tally.add(batch.failures, log, run.step)
        yield batch


def _after(run: Run, task: Task, log: RunLog, outcome: StepResult) -> None:
    """Keeps the loss of a step, or counts it as skipped; stops after too many."""
    if outcome.finite:
        run.losses.append(outcome.loss)
        run.nonfinite = 0
        task.after_step(run)
        return
    run.skipped += 1
    words = f"loss {outcome.loss:g}, gradient norm {outcome.norm:g}"
    log.event(
        "nonfinite",
        run.step,
        f"warning: skipped step {run.step}, not finite: {words}",
        loss=str(outcome.loss),
        grad_norm=str(outcome.norm),
        lr=outcome.lr,
    )
    overflow = math.isfinite(outcome.loss) and run.scaler.get_scale() >= 1.0
    if run.scaler.is_enabled() and overflow:
        return  # how the scale of float16 is found
    run.nonfinite += 1
    if run.nonfinite >= run.config.max_nonfinite:
        raise TrainingError(diagnose(run, task, outcome))


def _log(run: Run, log: RunLog, meter: Meter, outcome: StepResult) -> None:
    if run.losses:
        mean = math.fsum(run.losses) / len(run.losses)
        values = {
            "grad_norm": outcome.norm if outcome.finite else None,
            **meter.rates(run.world.size),
            "memory_mib": memory_mib(run.world.device),
        }
        log.loss(run.step, run.epoch, mean, outcome.lr, **values)
    meter.clear()
