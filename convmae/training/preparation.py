"""Everything that is checked and built before the first step of a run."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from convmae.training.checkpoint import (
    FOLDER,
    describe,
    find_checkpoint,
    plain,
    read_training_state,
)
from convmae.training.config import OptionError, PretrainConfig, config_to_mapping, suggest
from convmae.training.log import LOG, LossWindow
from convmae.training.machine import pick_device, pick_dtype
from convmae.training.optim import lr_at, make_optimiser
from convmae.training.sources import Source, open_source

if TYPE_CHECKING:
    from convmae.models import ConvMAE

OPTIONS = "args.yaml"


@dataclass
class Run:
    """Everything the loop needs, checked."""

    config: PretrainConfig
    folder: Path
    device: torch.device
    dtype: torch.dtype
    source: Source
    model: ConvMAE
    optimiser: torch.optim.Optimizer
    steps_per_epoch: int
    step: int = 0  # optimiser steps done
    window: LossWindow = field(default_factory=LossWindow)

    @property
    def total_steps(self) -> int:
        return self.config.epochs * self.steps_per_epoch

    def lr(self, step: int) -> float:
        """The learning rate of optimiser step `step`, counted from 0."""
        c = self.config
        epoch = step / self.steps_per_epoch
        return lr_at(epoch, c.peak_lr, c.min_lr, c.warmup_epochs, c.epochs)


def prepare(config: PretrainConfig) -> tuple[Run, list[str]]:
    """Checks everything and builds the run; writes nothing. Also what to tell about it."""
    folder = Path(config.output_dir).expanduser()
    resume = what_to_resume(config, folder)
    device = pick_device(config.device)
    dtype, why = pick_dtype(config.amp, device)
    model = _build_model(config)
    source = open_source(config.data_path, config.max_unreadable)
    steps_per_epoch = source.samples_per_epoch // config.effective_batch
    if steps_per_epoch == 0:
        raise OptionError(
            f"--batch_size {config.batch_size} with --accum_iter {config.accum_iter} needs "
            f"{config.effective_batch} pictures a step, but --data_path {config.data_path!r} has "
            f"{source.samples_per_epoch}"
        )
    model.to(device).train()
    optimiser = make_optimiser(model, config.weight_decay)
    run = Run(config, folder, device, dtype, source, model, optimiser, steps_per_epoch)
    rule = (
        "as given"
        if config.lr is not None
        else (f"blr {config.blr:g} x effective batch {config.effective_batch} / 256")
    )
    notes = [
        source.description,
        f"{config.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
        f"{config.size[0]} x {config.size[1]} pixels, {device}, "
        f"{str(dtype).removeprefix('torch.')} ({why}), {torch.get_num_threads()} threads",
        f"effective batch {config.effective_batch} = {config.batch_size} x {config.accum_iter}, "
        f"blr {config.blr:g}, lr {config.peak_lr:.3e} ({rule})",
        f"{config.epochs} epochs of {steps_per_epoch} steps, into {folder}",
    ]
    if config.warmup_epochs >= config.epochs:
        notes.append(
            f"note: --warmup_epochs {config.warmup_epochs:g} is not shorter than --epochs "
            f"{config.epochs}: the learning rate only rises"
        )
    if resume is not None:
        notes += _resume(run, resume)
    return run, notes


def what_to_resume(config: PretrainConfig, folder: Path) -> Path | None:
    """The checkpoint folder to go on from; refuses to write over another run."""
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"--output_dir {config.output_dir!r} is a file, not a folder")
    _check_writable(config.output_dir, folder)
    traces = [name for name in (LOG, FOLDER, f".{FOLDER}.old", OPTIONS) if (folder / name).exists()]
    has_checkpoint = any(name.endswith((FOLDER, f"{FOLDER}.old")) for name in traces)
    if config.resume == "auto":
        return find_checkpoint(folder, "--resume") if has_checkpoint else None
    if config.resume:
        resume = find_checkpoint(config.resume, "--resume")
        if has_checkpoint and resume.resolve().parent != folder.resolve():
            raise OptionError(
                f"--output_dir {config.output_dir!r} holds another run than --resume "
                f"{config.resume!r}; give a new folder, to keep both"
            )
        return resume
    if has_checkpoint or LOG in traces:
        raise OptionError(
            f"--output_dir {config.output_dir!r} already holds a run ({', '.join(traces)}); "
            "go on with it by --resume auto, or give a new folder"
        )
    return None


def _check_writable(option: str, folder: Path) -> None:
    parent = folder
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OptionError(f"--output_dir {option!r} cannot be written: no permission in {parent}")


def _build_model(config: PretrainConfig) -> ConvMAE:
    import convmae

    torch.manual_seed(config.seed)
    try:
        model = convmae.create_model(
            config.model, img_size=config.size, norm_pix_loss=config.norm_pix_loss
        )
    except ValueError as error:
        raise OptionError(f"--model: {error}") from error
    except TypeError:  # a classifier has no norm_pix_loss
        model = None
    if not isinstance(model, convmae.ConvMAE):
        like = suggest(config.model.replace("convvit", "convmae"), convmae.list_models("convmae_*"))
        raise OptionError(f"--model {config.model!r} has no decoder and cannot be pretrained{like}")
    return model


def _resume(run: Run, folder: Path) -> list[str]:
    """Loads weights, optimiser and progress into `run`; returns what to tell about it."""
    weights, state = read_training_state(folder)
    config = run.config
    mine = plain(run.model.config)
    if weights.config != mine:
        raise OptionError(
            f"--resume: {folder} is a checkpoint of {weights.describe()}, but this run is of "
            f"{describe(config.model, mine)}"
        )
    try:
        run.model.load_state_dict(weights.state)
        run.optimiser.load_state_dict(state["optimizer"])
        done = state["step"] / state["steps_per_epoch"]  # in epochs, as batches may differ now
        run.window = LossWindow(state["window"])
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise OptionError(f"--resume: {folder} does not fit this run: {error}") from error
    for group, decay in zip(run.optimiser.param_groups, (0.0, config.weight_decay), strict=True):
        group["weight_decay"] = decay
    run.step = round(done * run.steps_per_epoch)
    finished = run.step >= run.total_steps
    if finished and config.resume != "auto":
        raise OptionError(
            f"--epochs {config.epochs}: {folder} has been trained for {done:g} epochs already; "
            "give more to go on"
        )
    told = [f"going on from {folder}, epoch {done:.2f} (step {run.step})"]
    before, now = state["options"], config_to_mapping(config)
    changed = [
        f"{name} {before[name]} -> {now[name]}"
        for name in now
        if name in before and before[name] != now[name] and name not in ("resume", "output_dir")
    ]
    return told + ([f"note: options differ from before: {', '.join(changed)}"] if changed else [])


def write_options(config: PretrainConfig, folder: Path) -> None:
    import yaml

    new = folder / f".{OPTIONS}.new"
    new.write_text(yaml.safe_dump(config_to_mapping(config), sort_keys=False), encoding="utf-8")
    os.replace(new, folder / OPTIONS)
