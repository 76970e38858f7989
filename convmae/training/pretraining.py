"""`convmae pretrain`: the whole run, from the checks before the first step to the last picture."""

from __future__ import annotations

import signal
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from convmae.data import Batch, DataError, normalise
from convmae.data.loader import RunSampler, make_loader
from convmae.training.checkpoint import FOLDER, save_checkpoint
from convmae.training.config import config_to_mapping
from convmae.training.log import RunLog, read_log
from convmae.training.optim import set_lr
from convmae.training.pictures import (
    loss_picture,
    mask_noise,
    reconstruction_picture,
    save_picture,
)
from convmae.training.preparation import Run, prepare, write_options
from convmae.training.sources import UnreadableTally, preview

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import FrameType

    from torch import Tensor

    from convmae.models import ConvMAE
    from convmae.training.config import PretrainConfig

PREVIEW_IMAGES = 6
REMEDIES = "Try a lower --blr, more --warmup_epochs or --amp float32"


class TrainingError(RuntimeError):
    """A run had to stop; the message says why, and what is left of it."""


@dataclass
class PretrainSummary:
    """What a run did: also what `convmae pretrain` prints at its end."""

    output_dir: Path
    checkpoint: Path
    steps: int
    epochs: float
    first_loss: float
    last_loss: float
    seconds: float
    images_per_s: float
    interrupted: bool = False
    unreadable: dict[str, str] = field(default_factory=dict)


def pretrain(config: PretrainConfig) -> PretrainSummary:
    """Trains a ConvMAE as `config` says, and leaves everything in `config.output_dir`.

    The folder then holds `args.yaml` (the options), `log.txt` (JSON lines), `tensorboard/`,
    `checkpoint/` (`model.safetensors`, `training_state.pt`), `reconstruction.png` and `loss.png`.
    The same options give the same run, bit for bit on a CPU, interrupted and resumed or not. Ctrl-C
    and SIGTERM finish the step, save and return.

    Returns:
        A summary of the run.

    Raises:
        OptionError (a ValueError): an option cannot work. Nothing was trained or overwritten.
        convmae.data.DataError (a ValueError): no pictures, or too many of them unreadable.
        TrainingError: the loss became infinite or NaN, or a checkpoint could not be written.
    """
    config.validate()
    run, notes = prepare(config)
    run.folder.mkdir(parents=True, exist_ok=True)
    write_options(config, run.folder)
    log = RunLog(run.folder, run.step, run.total_steps, config.effective_batch)
    try:
        for note in notes:
            log.say(note)
        tally = UnreadableTally(run.source, config.max_unreadable)
        tally.report(log, run.step)
        began_at = run.step
        with _Interrupts() as interrupts:
            _loop(run, log, tally, interrupts)
        return _finish(run, log, tally, began_at, interrupts.asked)
    finally:
        log.close()


# -- the loop -------------------------------------------------------------------------------------


class _Interrupts:
    """Notes SIGINT and SIGTERM, so that a step is never cut in two; a second SIGINT is obeyed."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Interrupts:
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
        self.asked = True


def _loop(run: Run, log: RunLog, tally: UnreadableTally, interrupts: _Interrupts) -> None:
    """Trains to the end, or until an interrupt; the state is saved in both cases."""
    config, accum = run.config, run.config.accum_iter
    sampler = RunSampler(
        run.source.samples_per_epoch,
        config.batch_size,
        run.steps_per_epoch * accum,
        run.step * accum,
        run.total_steps * accum,
        config.seed,
    )
    workers = run.source.workers if config.num_workers is None else config.num_workers
    pinned = config.pin_mem and run.device.type == "cuda"
    dataset = run.source.dataset(config)
    batches = iter(make_loader(dataset, sampler, workers, pinned))
    saved = run.step
    while run.step < run.total_steps and not interrupts.asked:
        loss = torch.zeros((), device=run.device)
        for part in range(accum):
            batch = _next(batches)
            tally.add(batch.failures, log, run.step)
            loss += _accumulate(run, batch.images, run.step * accum + part)
        if config.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.clip_grad)
        lr = run.lr(run.step)
        set_lr(run.optimiser, lr)
        run.optimiser.step()
        run.optimiser.zero_grad(set_to_none=True)
        run.step += 1
        run.window.add(run.step, loss)
        log.tick()
        last = run.step == run.total_steps or interrupts.asked
        epoch_over = run.step % run.steps_per_epoch == 0
        save = last or (epoch_over and run.step // run.steps_per_epoch % config.save_every == 0)
        to_log = run.step % config.log_every == 0 or run.step == run.total_steps
        if save or to_log or run.device.type == "cpu":
            _check_finite(run, lr)
        if to_log:
            log.loss(run.step, run.step / run.steps_per_epoch, run.window.mean(), lr)
        if run.step % config.log_every == 0:  # at the last step a part of a window may stay
            run.window.clear()
        if save:
            _save(run, log)
            saved = run.step
    if saved != run.step:
        _save(run, log)


def _next(batches: Iterator[Batch]) -> Batch:
    """The next batch; an error of a loading process without that process's traceback."""
    try:
        return next(batches)
    except DataError as error:
        raise DataError(str(error).rpartition("DataError: ")[2].strip()) from error


def _accumulate(run: Run, images: Tensor, number: int) -> Tensor:
    """Adds the gradients of one batch; returns its share of the step's loss."""
    config = run.config
    inputs = normalise(images.to(run.device, non_blocking=True))
    patches = run.model.grid[0] * run.model.grid[1]
    noise = mask_noise(len(images), patches, config.seed, 1, number, device=run.device)
    half = run.dtype != torch.float32
    with torch.autocast(run.device.type, dtype=run.dtype if half else None, enabled=half):
        output = run.model(inputs, mask_ratio=config.mask_ratio, noise=noise)
    share = output.loss / config.accum_iter
    share.backward()
    return share.detach()


def _check_finite(run: Run, lr: float) -> None:
    """Reads the losses noted so far; stops the run at the first that is infinite or NaN."""
    step = run.window.read()
    if step is None:
        return
    broken = _not_finite(run.model)
    where = (
        f"{len(broken)} parameters are not finite, first {broken[0]}"
        if broken
        else ("all parameters are still finite")
    )
    raise TrainingError(
        f"the loss is not finite at step {step} of {run.total_steps} (epoch "
        f"{step / run.steps_per_epoch:.2f}, lr {lr:.3e}, {str(run.dtype).removeprefix('torch.')}); "
        f"{where}. Stopped; {_what_is_left(run)}. {REMEDIES}"
    )


def _not_finite(model: ConvMAE) -> list[str]:
    """Names of the parameters that hold an infinity or a NaN."""
    return [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]


def _what_is_left(run: Run) -> str:
    folder = run.folder / FOLDER
    return f"the checkpoint before is intact in {folder}" if folder.exists() else "none was saved"


def _save(run: Run, log: RunLog) -> None:
    """Writes the checkpoint and the pictures of what it paints; never of broken weights."""
    began = time.perf_counter()
    broken = _not_finite(run.model)
    if broken:
        raise TrainingError(
            f"{len(broken)} parameters are not finite after step {run.step}, first {broken[0]}: "
            f"stopped without saving them; {_what_is_left(run)}. {REMEDIES}"
        )
    state = {
        "step": run.step,
        "steps_per_epoch": run.steps_per_epoch,
        "window": list(run.window.values),
        "optimizer": run.optimiser.state_dict(),
        "options": config_to_mapping(run.config),
    }
    try:
        save_checkpoint(run.folder, run.model, run.config.model, state)
    except OSError as error:
        raise TrainingError(
            f"the checkpoint of step {run.step} could not be written: {error}; "
            f"the one before is intact in {run.folder}"
        ) from error
    images = preview(run.source, PREVIEW_IMAGES, run.config.size)
    picture = reconstruction_picture(run.model, images, run.config.mask_ratio, run.config.seed)
    log.picture("reconstruction", np.asarray(picture), run.step)
    save_picture(picture, run.folder / "reconstruction.png")
    log.idle(time.perf_counter() - began)


def _finish(
    run: Run, log: RunLog, tally: UnreadableTally, began_at: int, interrupted: bool
) -> PretrainSummary:
    entries = [entry for entry in read_log(run.folder) if "loss" in entry]
    if entries:
        loss_picture(entries, run.folder / "loss.png")
    steps = run.step - began_at
    summary = PretrainSummary(
        output_dir=run.folder,
        checkpoint=run.folder / FOLDER,
        steps=run.step,
        epochs=run.step / run.steps_per_epoch,
        first_loss=entries[0]["loss"] if entries else float("nan"),
        last_loss=entries[-1]["loss"] if entries else float("nan"),
        seconds=log.seconds,
        images_per_s=steps * run.config.effective_batch / log.seconds,
        interrupted=interrupted and run.step < run.total_steps,
        unreadable=tally.named(),
    )
    return summary
