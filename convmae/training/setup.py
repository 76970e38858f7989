"""Everything that is checked and built before the first step of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from convmae.config import OptionError, config_to_mapping, for_option
from convmae.data import IMAGENET_MEAN, IMAGENET_STD, Statistics, channel_statistics, open_source
from convmae.records.folder import RunFolder
from convmae.records.trackers import import_wandb
from convmae.seeds import SCHEME
from convmae.training.distributed import load_whole, spread
from convmae.training.machine import pick_dtype
from convmae.training.optim import make_scheduler
from convmae.training.state import Run
from convmae.training.step import clip, differentiate
from convmae.training.step_graph import WARM_UP, StepGraph, cuda_capture, why_not
from convmae.weights.checkpoint import (
    describe,
    find_checkpoint,
    plain,
    read_training_state,
    stored_reading,
)

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from convmae.config import RunConfig
    from convmae.data import Source
    from convmae.training.distributed import World
    from convmae.training.task import Task

BLOCKS = "blocks"  # a mode of --torchcompile
MEASURED = 1000  # pictures whose mean and deviation stand for all


def prepare(config: RunConfig, task: Task, world: World) -> tuple[Run, list[str]]:
    """Checks everything and builds the run; writes nothing. Also what to tell about it."""
    folder = RunFolder.of(config.output_dir)
    with for_option("resume"):
        resume = what_to_resume(config, folder)
    config.check_rates(world.size)
    dtype, why = pick_dtype(config.amp, world.device)
    if config.log_wandb:
        import_wandb()
    torch.manual_seed(config.seed)
    learnt = stored_reading(resume) if resume is not None else task.learnt_reading(config)
    reading, reading_notes = config.reading.over(learnt)
    task.reading = reading
    source = open_source(
        config.data_path,
        max_unreadable=config.max_unreadable,
        max_samples=config.max_samples,
        seed=config.seed,
        reading=reading,
    )
    steps_per_epoch = _steps_per_epoch(config, source, world)
    torch.manual_seed(config.seed)
    task.transform(config).check(source.channels, source.dtype)
    model, name, model_notes = task.build(config, source)
    statistics, origin = _statistics(config, task, source)
    _prepare_model(model, config, world)
    step_model = spread(model, world)
    optimizer = task.optimizer(task.groups(model, config), config)
    run = Run(
        config=config,
        folder=folder,
        world=world,
        dtype=dtype,
        source=source,
        statistics=statistics,
        model=model,
        model_name=name,
        step_model=step_model,
        optimizer=optimizer,
        scheduler=make_scheduler(optimizer, config, config.peak_lr(world.size), steps_per_epoch),
        scaler=torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16),
        steps_per_epoch=steps_per_epoch,
        workers=source.workers if config.num_workers is None else config.num_workers,
        reading=reading,
    )
    notes = [source.description, *reading_notes, *model_notes, *_notes(run, why), origin]
    if resume is not None:
        notes += _resume(run, task, resume)
    notes += _use_graph(run, task)
    task.begin(run)
    return run, notes


def _steps_per_epoch(config: RunConfig, source: Source, world: World) -> int:
    needed = config.effective_batch(world.size)
    if source.samples_per_epoch >= needed:
        return source.samples_per_epoch // needed
    processes = f" in {world.size} processes" if world.size > 1 else ""
    raise OptionError(
        f"--batch_size {config.batch_size} with --accum_iter {config.accum_iter}{processes} needs "
        f"{needed} pictures a step, but --data_path {config.data_path!r} has "
        f"{source.samples_per_epoch}"
    )


def _statistics(config: RunConfig, task: Task, source: Source) -> tuple[Statistics, str]:
    """Mean and deviation to normalise with, and where they come from, in words."""
    learnt = task.statistics(config)
    if config.mean is not None and config.std is not None:
        mean, std, where = config.mean, config.std, "as given"
    elif learnt is not None:
        mean, std, where = *learnt, "of the weights to start from"
    elif source.channels == len(IMAGENET_MEAN):
        mean, std, where = IMAGENET_MEAN, IMAGENET_STD, "ImageNet's"
    else:
        mean, std = map(tuple, channel_statistics(source, MEASURED, config.num_workers))
        where = f"measured on up to {MEASURED} pictures"
    if len(mean) != source.channels:
        raise OptionError(
            f"--mean and --std have {len(mean)} numbers ({where}), but the pictures of --data_path "
            f"{config.data_path!r} have {source.channels} channels"
        )
    numbers = " ".join(f"{value:.4g}" for value in mean), " ".join(f"{v:.4g}" for v in std)
    statistics = Statistics(tuple(mean), tuple(std))
    return statistics, f"mean {numbers[0]}, deviation {numbers[1]} ({where})"


def _prepare_model(model: Any, config: RunConfig, world: World) -> None:
    """Device, checkpointing of activations, compilation: before the model is spread."""
    model.to(world.device).train()
    if config.grad_checkpointing:
        model.set_grad_checkpointing(True)
    mode = config.torchcompile
    if mode is None:
        return
    known = torch.compiler.list_backends(exclude_tags=())
    if mode != BLOCKS and mode not in known:
        raise OptionError(
            f"--torchcompile must be {BLOCKS}, which compiles block by block, or a backend for the "
            f"whole model, {', '.join(known)}; got {mode!r}"
        )
    if mode == BLOCKS:
        model.compile_blocks()
    elif world.strategy == "fsdp2":  # block by block, as the parameters are gathered
        model.compile_blocks(mode)
    else:
        model.compile(backend=mode)


def _use_graph(run: Run, task: Task) -> list[str]:
    """Lets the run capture its steps if it is to and can; what to tell about it."""
    if not getattr(run.config, "cuda_graph", False):
        return []
    reason = why_not(run)
    if reason is not None:
        return [f"note: --cuda_graph: steps run without a graph: {reason}"]

    def compute(images: Tensor, inputs: Any) -> tuple[Tensor, Tensor]:
        loss = differentiate(run, lambda: task.captured_loss(run, images, inputs))
        return loss, clip(run)

    run.graph = StepGraph(run.optimizer, compute, cuda_capture)
    return [f"--cuda_graph: steps are captured after the first {WARM_UP}"]


def _notes(run: Run, why: str) -> list[str]:
    config, world = run.config, run.world
    processes = f" x {world.size} processes ({world.strategy})" if world.parallel else ""
    effective, peak = config.effective_batch(world.size), config.peak_lr(world.size)
    rule = (
        "as given"
        if config.lr is not None
        else f"blr {config.blr:g} x effective batch {effective} / 256"
    )
    notes = [
        f"{run.model_name}: {sum(p.numel() for p in run.model.parameters()) / 1e6:.2f} M "
        f"parameters, {config.size[0]} x {config.size[1]} pixels, {world.device}, "
        f"{str(run.dtype).removeprefix('torch.')} ({why}), {torch.get_num_threads()} threads",
        f"effective batch {effective} = {config.batch_size} x {config.accum_iter}{processes}, "
        f"blr {config.blr:g}, lr {peak:.3e} ({rule})",
        f"{config.epochs} epochs of {run.steps_per_epoch} steps, into {run.folder}",
    ]
    if config.warmup_epochs >= config.epochs:
        notes.append(
            f"note: --warmup_epochs {config.warmup_epochs:g} is not shorter than --epochs "
            f"{config.epochs}: the learning rate only rises"
        )
    return notes


# -- the run's folder -----------------------------------------------------------------------------


def what_to_resume(config: RunConfig, folder: RunFolder) -> Path | None:
    """The checkpoint folder to go on from; refuses to write over another run."""
    folder.check_writable()
    if config.resume == "auto":
        return find_checkpoint(folder.path) if folder.has_checkpoint else None
    if config.resume:
        resume = find_checkpoint(config.resume)
        if folder.has_checkpoint and resume.resolve().parent != folder.path.resolve():
            raise OptionError(
                f"--output_dir {config.output_dir!r} holds another run than --resume "
                f"{config.resume!r}; give a new folder, to keep both"
            )
        return resume
    if folder.has_checkpoint or folder.log.exists():
        raise OptionError(
            f"--output_dir {config.output_dir!r} already holds a run "
            f"({', '.join(folder.traces())}); go on with it by --resume auto, or give a new folder"
        )
    return None


# -- going on -------------------------------------------------------------------------------------


def _resume(run: Run, task: Task, folder: Path) -> list[str]:
    """Loads weights, optimizer and progress into `run`; returns what to tell about it."""
    with for_option("resume"):
        weights, state = read_training_state(folder)
    config = run.config
    mine = plain(run.model.config)  # type: ignore[arg-type]
    if weights.model != run.model_name or weights.config != mine:
        raise OptionError(
            f"--resume: {folder} is a checkpoint of {weights.describe()}, but this run is of "
            f"{describe(run.model_name, mine)}"
        )
    try:
        load_whole(run.model, run.optimizer, weights.state, state["optimizer"])
        done = state["step"] / state["steps_per_epoch"]  # in epochs, as batches may differ now
        run.losses = list(state["losses"])
        run.nonfinite, run.skipped = state["nonfinite"], state["skipped"]
        if run.scaler.is_enabled() and state["scaler"]:
            run.scaler.load_state_dict(state["scaler"])
        task.load_state(run, state["task"])
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise OptionError(f"--resume: {folder} does not fit this run: {error}") from error
    run.step = round(done * run.steps_per_epoch)
    if run.step >= run.total_steps and config.resume != "auto":
        raise OptionError(
            f"--epochs {config.epochs}: {folder} has been trained for {done:g} epochs already; "
            "give more to go on"
        )
    notes = [f"going on from {folder}, epoch {done:.2f} (step {run.step})"]
    if state.get("seeds") != SCHEME:
        notes.append(
            f"note: {folder} was written by another version, whose random numbers were others: the "
            "order, crops and masks from here on are not those that it would have gone on with"
        )
    before, now = state["options"], config_to_mapping(config)
    changed = [
        f"{name} {before[name]} -> {now[name]}"
        for name in now
        if name in before and before[name] != now[name] and name not in ("resume", "output_dir")
    ]
    return notes + ([f"note: options differ from before: {', '.join(changed)}"] if changed else [])
