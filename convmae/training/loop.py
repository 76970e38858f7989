"""The loop that every kind of training shares: steps, skipped steps, logs, evaluations, saves."""

from __future__ import annotations

import math
import signal
import time
from typing import TYPE_CHECKING

from convmae.records.log import memory_mib
from convmae.training.diagnosis import diagnose
from convmae.training.meter import Meter
from convmae.training.saving import save
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
    batches = _batches(run, task)
    meter = Meter(run.workers)
    stop = False
    while run.step < run.total_steps and not stop:
        began = time.perf_counter()
        outcome = take_step(run, task, batches, meter, log, lambda f: tally.add(f, log, run.step))
        stop = run.world.any(interrupts.asked)
        run.step += 1
        _after(run, task, log, outcome)
        meter.stepped += time.perf_counter() - began
        log.tick()
        last = run.step == run.total_steps
        whole_window = run.step % run.config.log_every == 0
        if whole_window or last:
            _log(run, log, meter, outcome)
        if whole_window:  # at the last step a part may stay, for a run that goes on later
            run.losses.clear()
        began = time.perf_counter()
        task.evaluate(run, log)
        if run.due(run.config.save_every) or stop:
            save(run, task, log)
        log.idle(time.perf_counter() - began)
    return (interrupts.number or signal.SIGTERM) if stop and run.step < run.total_steps else None


def _batches(run: Run, task: Task) -> Iterator[Batch]:
    """All batches of this process from the run's present step on."""
    config, accum = run.config, run.config.accum_iter
    return run.source.batches(
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
