"""The loop that every kind of training shares: steps, skipped steps, logs, evaluations, saves."""

from __future__ import annotations

import math
import signal
import threading
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from convmae.data import derive_seed, normalise
from convmae.training.checkpoint import save_checkpoint
from convmae.training.config import config_to_mapping
from convmae.training.diagnosis import REMEDIES, diagnose, not_finite, what_is_left
from convmae.training.distributed import gradients, whole_model, whole_optimiser
from convmae.training.log import memory_mib
from convmae.training.randomness import seed_everything
from convmae.training.report import write_report
from convmae.training.step_graph import GraphError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import FrameType

    import numpy as np
    from PIL import Image as PILImage
    from torch import Tensor, nn

    from convmae.data import Batch, Source
    from convmae.training.distributed import World
    from convmae.training.log import RunLog
    from convmae.training.sources import UnreadableTally
    from convmae.training.step_graph import StepGraph

STEP_STREAM = 4  # keeps the seeds of what is random within a step apart from all others


class TrainingError(RuntimeError):
    """A run had to stop; the message says why, and what is left of it."""


@dataclass
class Run:
    """Everything the loop needs, checked, and how far it has come."""

    config: Any  # a RunConfig, of the task's own kind
    folder: Path
    world: World
    dtype: torch.dtype
    source: Source
    mean: tuple[float, ...]
    std: tuple[float, ...]
    model: Any  # a ConvMAE or ConvViT, with its own parameter names
    model_name: str
    step_model: nn.Module  # what a step calls: the model, or its data-parallel wrapper
    optimiser: torch.optim.Optimizer
    scheduler: Any  # of timm
    scaler: torch.amp.GradScaler
    steps_per_epoch: int
    workers: int
    graph: StepGraph | None = None  # runs whole steps, where that was asked for and can be
    step: int = 0  # optimiser steps done, skipped ones included
    losses: list[float] = field(default_factory=list)  # since the last line of the log
    nonfinite: int = 0  # steps skipped in a row
    skipped: int = 0  # steps skipped in all

    @property
    def total_steps(self) -> int:
        return self.config.epochs * self.steps_per_epoch

    @property
    def epoch(self) -> float:
        return self.step / self.steps_per_epoch

    @property
    def images_per_step(self) -> int:
        return self.config.effective_batch(self.world.size)

    def autocast(self) -> torch.autocast:
        """The arithmetic of the run, for its forward passes."""
        half = self.dtype != torch.float32
        dtype = self.dtype if half else None
        return torch.autocast(self.world.device.type, dtype=dtype, enabled=half)

    def due(self, every: float) -> bool:
        """Whether the step just done ends a span of `every` epochs, or the run."""
        steps = max(1, round(every * self.steps_per_epoch))
        return self.step % steps == 0 or self.step == self.total_steps


class Task(ABC):
    """One kind of training: what it trains, on what, and what is to be seen of it."""

    command: str

    @abstractmethod
    def transform(self, config: Any) -> Any:
        """From a stored picture to one of a training batch."""

    @abstractmethod
    def build(self, config: Any, source: Source) -> tuple[nn.Module, str, list[str]]:
        """The model, its name for `convmae.create_model`, and what to tell about it."""

    @abstractmethod
    def groups(self, model: nn.Module, config: Any) -> list[dict[str, Any]]:
        """Parameter groups with their decays, and `lr_scale` where a group learns more slowly."""

    @abstractmethod
    def optimiser(self, groups: list[dict[str, Any]], config: Any) -> torch.optim.Optimizer:
        """The optimiser of these groups; its learning rate is set in every step."""

    @abstractmethod
    def loss(self, run: Run, batch: Batch, images: Tensor) -> Tensor:
        """The mean loss of a batch; `images` are on the device and normalised."""

    def inputs(self, run: Run, batch: Batch) -> Any:
        """What `captured_loss` reads besides the images: tensors on the device, of fixed shapes.

        A task whose options have `cuda_graph` defines this and `captured_loss`.
        """
        raise NotImplementedError(f"the steps of {self.command} cannot be captured")

    def captured_loss(self, run: Run, images: Tensor, inputs: Any) -> Tensor:
        """`loss` of images and of what `inputs` gave; decides nothing on the host."""
        raise NotImplementedError(f"the steps of {self.command} cannot be captured")

    def statistics(self, config: Any) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Mean and deviation that the weights to start from were trained with, if any."""
        return None

    def begin(self, run: Run) -> None:
        """Called once before the first step, when a resumed state has been loaded."""
        return

    def after_step(self, run: Run) -> None:
        """Called after every optimiser step that was not skipped."""
        return

    def evaluate(self, run: Run, log: RunLog) -> None:
        """Called after the step; a task that evaluates does it when it is due."""
        return

    def draw(self, run: Run) -> PILImage.Image | None:
        """A picture of what the model does, in all processes, or None."""
        return None

    def state(self, run: Run) -> dict[str, Any]:
        """What a checkpoint has to hold besides model and optimiser: tensors and plain values."""
        return {}

    def load_state(self, run: Run, state: dict[str, Any]) -> None:
        """Takes back what `state` gave."""
        return


class Interrupts:
    """Notes SIGINT and SIGTERM, so that a step is never cut in two; a second one is obeyed."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        return self.number is not None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.number = number


class Meter:
    """How fast the model computes and how fast pictures arrive, since the last line of the log."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.clear()

    def clear(self) -> None:
        self.images = 0
        self.prepared = self.waited = self.stepped = 0.0  # seconds

    def batch(self, images: int, prepared: float, waited: float) -> None:
        """A batch took `prepared` seconds in its own process, and `waited` to arrive here."""
        self.images += images
        self.prepared += prepared
        self.waited += waited

    def rates(self, processes: int) -> dict[str, Any]:
        """Images a second of both, for all processes together, and which one is slower."""
        computing = max(self.stepped - self.waited, 1e-9)
        model = processes * self.images / computing
        pipeline = processes * self.images * max(self.workers, 1) / max(self.prepared, 1e-9)
        return {
            "model_images_per_s": round(model, 2),
            "input_images_per_s": round(pipeline, 2),
            "bottleneck": "input" if pipeline < model else "model",
        }


# -- the loop -------------------------------------------------------------------------------------


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
        outcome = _step(run, task, batches, meter, log, lambda f: tally.add(f, log, run.step))
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


@dataclass
class Outcome:
    """What a step came to, the same in every process."""

    loss: float
    norm: float
    lr: float
    batch: Batch

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.norm)


def _step(
    run: Run,
    task: Task,
    batches: Iterator[Batch],
    meter: Meter,
    log: RunLog,
    told: Callable[[list], None],
) -> Outcome:
    """One optimiser step; it is skipped where loss or gradient is not finite."""
    accum, world = run.config.accum_iter, run.world
    total = torch.zeros((), device=world.device)
    run.scheduler.step_update(run.step)
    rate = max(group["lr"] for group in run.optimiser.param_groups)
    for part in range(accum):
        began = time.perf_counter()
        batch = next(batches)
        meter.batch(len(batch.images), batch.seconds, time.perf_counter() - began)
        told(batch.failures)
        if run.graph is not None:
            figures = _replay(run, task, batch, log)
            if figures is not None:
                return Outcome(*figures, rate, batch)
        total += backward(run, task, batch, run.step * accum + part, part == accum - 1)
    run.scaler.unscale_(run.optimiser)
    norm = float(clip(run))
    (loss,) = world.mean(total)
    outcome = Outcome(loss, norm, rate, batch)
    if run.scaler.is_enabled():
        run.scaler.step(run.optimiser)  # skips by itself where a gradient is not finite
        run.scaler.update()
    elif outcome.finite:
        run.optimiser.step()
    run.optimiser.zero_grad(set_to_none=True)
    return outcome


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
    seed_everything(derive_seed(run.config.seed, STEP_STREAM, number, run.world.rank))
    return normalise(images, run.mean, run.std)


def differentiate(run: Run, loss: Callable[[], Tensor], exchange: bool = True) -> Tensor:
    """Adds the gradients of a loss; returns its share of the step's."""
    with gradients(run.step_model, run.world, exchange):
        with run.autocast():
            value = loss()
        share = value / run.config.accum_iter
        run.scaler.scale(share).backward()
    return share.detach()


def clip(run: Run) -> Tensor:
    """The norm of all gradients together; they are scaled down to `clip_grad` if it is given."""
    parameters = [p for group in run.optimiser.param_groups for p in group["params"]]
    norm = torch.nn.utils.get_total_norm(p.grad for p in parameters if p.grad is not None)
    if run.config.clip_grad is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, run.config.clip_grad, norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def _after(run: Run, task: Task, log: RunLog, outcome: Outcome) -> None:
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


def _log(run: Run, log: RunLog, meter: Meter, outcome: Outcome) -> None:
    if run.losses:
        mean = math.fsum(run.losses) / len(run.losses)
        values = {
            "grad_norm": outcome.norm if outcome.finite else None,
            **meter.rates(run.world.size),
            "memory_mib": memory_mib(run.world.device),
        }
        log.loss(run.step, run.epoch, mean, outcome.lr, **values)
    meter.clear()


# -- saving ---------------------------------------------------------------------------------------


def save(run: Run, task: Task, log: RunLog) -> None:
    """Writes checkpoint, picture and report; never a checkpoint of broken weights.

    Every process takes part, the main one writes.

    Raises:
        TrainingError: parameters are not finite, or the disk refused; the checkpoint before is
            still there.
    """
    weights = whole_model(run.model)
    state = {
        "step": run.step,
        "steps_per_epoch": run.steps_per_epoch,
        "losses": list(run.losses),
        "nonfinite": run.nonfinite,
        "skipped": run.skipped,
        "optimizer": whole_optimiser(run.model, run.optimiser),
        "scaler": run.scaler.state_dict(),
        "options": config_to_mapping(run.config),
        "task": task.state(run),
    }
    problem = run.world.share(_write(run, weights, state) if run.world.main else None)
    if problem:
        raise TrainingError(problem)
    picture = task.draw(run)
    if run.world.main:
        _show(run, log, picture)


def _write(run: Run, weights: dict[str, Tensor], state: dict[str, Any]) -> str | None:
    """Writes the checkpoint; what prevented it, in words."""
    broken = not_finite(weights)
    if broken:
        return (
            f"{len(broken)} parameters are not finite after step {run.step}, first {broken[0]}: "
            f"stopped without saving them; {what_is_left(run)}. {REMEDIES}"
        )
    try:
        save_checkpoint(
            run.folder, run.model, run.model_name, state, weights, mean=run.mean, std=run.std
        )
    except OSError as error:
        return (
            f"the checkpoint of step {run.step} could not be written: {error}; {what_is_left(run)}"
        )
    return None


def _show(run: Run, log: RunLog, picture: PILImage.Image | None) -> None:
    """Keeps the picture and the report; a disk that refuses them does not stop a run."""
    from convmae.training.pictures import save_picture

    try:
        if picture is not None:
            log.picture("reconstruction", _as_array(picture), run.step)
            save_picture(picture, run.folder / "reconstructions" / f"step-{run.step:08}.png")
            save_picture(picture, run.folder / "reconstruction.png")
        write_report(run.folder)
    except OSError as error:
        log.say(f"warning: pictures and report of step {run.step} were not written: {error}")


def _as_array(picture: PILImage.Image) -> np.ndarray:
    import numpy

    return numpy.asarray(picture)
