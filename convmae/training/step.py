"""One optimizer step: batches in, gradients, clipping, the update; or a captured graph of it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from convmae.data import DataError, LoadingError, normalise
from convmae.seeds import Stream, derive_seed, seed_everything
from convmae.training.distributed import gradients
from convmae.training.optim import clips_by_itself
from convmae.training.step_graph import GraphError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from convmae.data import Batch
    from convmae.records.log import RunLog
    from convmae.training.meter import Meter
    from convmae.training.state import Run
    from convmae.training.task import Task


@dataclass
class StepResult:
    """What a step came to, the same in every process."""

    loss: float
    norm: float
    lr: float
    batch: Batch

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.norm)


def take_step(
    run: Run,
    task: Task,
    batches: Iterator[Batch],
    meter: Meter,
    log: RunLog,
) -> StepResult:
    """One optimizer step; it is skipped where loss or gradient is not finite.

    Where a batch cannot be had, the run is left as it was before the step.
    """
    accum, world = run.config.accum_iter, run.world
    total = torch.zeros((), device=world.device)
    run.scheduler.step_update(run.step)
    rate = max(group["lr"] for group in run.optimizer.param_groups)
    buffers = [b.clone() for b in run.model.buffers()] if accum > 1 else []
    for part in range(accum):
        began = time.perf_counter()
        try:
            batch = next(batches)
        except (DataError, LoadingError):
            _forget_parts(run, buffers)
            raise
        meter.batch(len(batch.images), batch.seconds, time.perf_counter() - began)
        if run.graph is not None:
            figures = _replay(run, task, batch, log)
            if figures is not None:
                return StepResult(*figures, rate, batch)
        total += backward(run, task, batch, run.step * accum + part, part == accum - 1)
    run.scaler.unscale_(run.optimizer)
    norm = float(clip(run))
    (loss,) = world.mean(total)
    outcome = StepResult(loss, norm, rate, batch)
    if run.scaler.is_enabled():
        run.scaler.step(run.optimizer)  # skips by itself where a gradient is not finite
        run.scaler.update()
    elif outcome.finite:
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return outcome


@torch.no_grad()
def _forget_parts(run: Run, buffers: list[Tensor]) -> None:
    """Undoes what the parts of a step before this one left: gradients, statistics of norms."""
    run.optimizer.zero_grad(set_to_none=True)
    for now, before in zip(run.model.buffers(), buffers):
        now.copy_(before)


def _replay(run: Run, task: Task, batch: Batch, log: RunLog) -> tuple[float, float] | None:
    """The whole step by the graph: its loss and norm; None, and no graph any more, if it cannot."""
    assert run.graph is not None
    images = _prepare(run, batch, run.step)
    try:
        return run.graph(images, task.inputs(run, batch))
    except GraphError as error:
        run.graph.close()
        run.graph = None
        log.say(f"note: --cuda_graph: from step {run.step + 1} on without a graph: {error}")
        return None


def backward(run: Run, task: Task, batch: Batch, number: int, exchange: bool) -> Tensor:
    """Adds the gradients of one batch; returns its share of the step's loss."""
    images = _prepare(run, batch, number)
    return differentiate(run, lambda: task.loss(run, batch, images), exchange)


def _prepare(run: Run, batch: Batch, number: int) -> Tensor:
    """The images of a batch, on the device and normalised; seeds what is random in their step."""
    images = batch.images.to(run.world.device, non_blocking=True)
    seed_everything(derive_seed(run.config.seed, Stream.STEP, number, run.world.rank))
    return normalise(images, *run.statistics)


def differentiate(run: Run, loss: Callable[[], Tensor], exchange: bool = True) -> Tensor:
    """Adds the gradients of a loss; returns its share of the step's."""
    with gradients(run.step_model, run.world, exchange):
        with run.autocast():
            value = loss()
        share = value / run.config.accum_iter
        run.scaler.scale(share).backward()
    return share.detach()


def clip(run: Run) -> Tensor:
    """The norm of all gradients together; they are scaled down to `clip_grad` if it is given.

    An optimizer that does so in its own step is left to it.
    """
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.get_total_norm(p.grad for p in parameters if p.grad is not None)
    if run.config.clip_grad is not None and not clips_by_itself(run.optimizer):
        torch.nn.utils.clip_grads_with_norm_(parameters, run.config.clip_grad, norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
