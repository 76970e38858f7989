"""Everything that is checked and built before the first step of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from convmae.config import OptionError, config_to_mapping, for_option
from convmae.data import IMAGENET, IMAGENET_MEAN, DataError, Statistics
from convmae.data.apart import check_apart
from convmae.data.fingerprint import Fingerprint
from convmae.data.statistics import check_deviations, far_apart, in_words, measure
from convmae.records.folder import RunFolder
from convmae.records.trackers import import_wandb
from convmae.seeds import SCHEME
from convmae.training.distributed import load_whole, spread
from convmae.training.machine import pick_dtype
from convmae.training.optim import make_scheduler
from convmae.training.state import Run
from convmae.training.step import clip, differentiate
from convmae.training.step_graph import WARM_UP, StepGraph, cuda_capture, why_not
from convmae.training.sync_norms import has_batch_norm, share_statistics
from convmae.weights.checkpoint import (
    describe,
    find_checkpoint,
    plain,
    read_training_state,
    stored_reading,
)

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from convmae.config import RunConfig
    from convmae.data import Source
    from convmae.data.statistics import Measured
    from convmae.training.distributed import World
    from convmae.training.task import Task
    from convmae.weights.checkpoint import Weights

BLOCKS = "blocks"  # a mode of --torchcompile
RECOMPILE_LIMIT = 64  # programs of one function, beyond which it is no longer compiled
MEASURED = 1000  # pictures whose mean and deviation stand for all
COMPARED = 64  # pictures that tell whether a given mean is of such pictures at all


def prepare(config: RunConfig, task: Task, world: World) -> tuple[Run, list[str]]:
    """Checks everything and builds the run; writes nothing. Also what to tell about it."""
    folder = RunFolder.of(config.output_dir, task.drawn)
    check_apart(folder.path, config.data_path)
    with for_option("resume"):
        resume = what_to_resume(config, folder)
        saved = None if resume is None else read_training_state(resume)
    config.check_rates(world.size)
    dtype, why = pick_dtype(config.amp, world.device)
    if config.log_wandb:
        import_wandb()
    torch.manual_seed(config.seed)
    learnt = stored_reading(resume) if resume is not None else task.learnt_reading(config)
    reading, reading_notes = config.reading.over(learnt)
    task.reading = reading
    source = task.open_data(config, reading, world)
    fingerprint = world.share(source.fingerprint() if world.main else None)
    changes = None if saved is None else _changes(config, fingerprint, saved[1])
    steps_per_epoch = _steps_per_epoch(config, source, world)
    torch.manual_seed(config.seed)
    task.transform(config).check(source.channels, source.dtype)
    task.resumed = resume
    model, name, model_notes = task.build(config, source)
    stored = None if saved is None else saved[0].pictures
    statistics, origin = _statistics(config, task, source, world, stored)
    norm_notes = _share_statistics(model, config, world)
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
        fingerprint=fingerprint,
        data_changes=changes,
    )
    notes = [source.description, *reading_notes, *model_notes, *_notes(run, why), *origin]
    notes += norm_notes
    if resume is not None and saved is not None:
        notes += _resume(run, task, resume, *saved)
    notes += _use_graph(run, task)
    task.begin(run)
    return run, notes


def _changes(
    config: RunConfig, fingerprint: Fingerprint | None, state: dict[str, Any]
) -> str | None:
    """How the pictures differ from those of the checkpoint to go on from, or that it is not known.

    Raises:
        OptionError: they differ, and that was not allowed.
    """
    before = Fingerprint.from_state(state.get("data"))
    if before is None or fingerprint is None:
        return (
            f"--resume {config.resume}: whether the pictures are those of before is not known, as "
            "the checkpoint does not tell which they were"
        )
    changes = fingerprint.changes_since(before)
    if changes is None:
        return None
    said = (
        f"--resume {config.resume}: the pictures of --data_path {config.data_path!r} are not those "
        f"of before: {changes}"
    )
    if not config.allow_changed_data:
        raise OptionError(
            f"{said}; give those of before, or --allow_changed_data to go on with these, whose "
            "order and number of steps are others"
        )
    return f"{said}; going on with these (--allow_changed_data)"


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


def _statistics(
    config: RunConfig, task: Task, source: Source, world: World, stored: Statistics | None
) -> tuple[Statistics, list[str]]:
    """Mean and deviation to normalise with, and what to tell about them.

    Args:
        config, task, source, world: of the run.
        stored: those of the checkpoint to go on from, if it tells them.
    """
    learnt = task.statistics(config)
    measured = None
    if config.mean is not None and config.std is not None:
        statistics, where = Statistics(config.mean, config.std), "as given"
    elif stored is not None:
        statistics, where = stored, "of the run so far"
    elif learnt is not None:
        statistics, where = learnt, "of the weights to start from"
    elif (source.channels, source.dtype) == (len(IMAGENET_MEAN), torch.uint8):
        statistics, where = IMAGENET, "ImageNet's, as for all pictures of 3 channels of 8 bits"
    else:
        measured = _measured(config, source, world, MEASURED)
        check_deviations(measured, f"--data_path {config.data_path!r}")
        statistics, where = measured.statistics, f"measured on {_which(measured, source)}"
    if len(statistics.mean) != source.channels:
        raise OptionError(
            f"--mean and --std have {len(statistics.mean)} numbers ({where}), but the pictures of "
            f"--data_path {config.data_path!r} have {source.channels} channels"
        )
    mean, std = map(in_words, statistics)
    notes = [f"mean {mean}, deviation {std} ({where})"]
    if measured is not None:
        notes += [
            f"note: not measured, unreadable: {name}: {why}" for name, why in measured.failures
        ]
    elif statistics in (learnt, (config.mean, config.std)):
        notes += _compared(config, source, world, statistics, where)
    return statistics, notes


def _measured(config: RunConfig, source: Source, world: World, count: int) -> Measured:
    """Measured once, in the main process.

    Raises:
        DataError: in every process, if the pictures cannot be read.
    """
    found, problem = None, ""
    if world.main:
        try:
            found = measure(source, count, config.num_workers)
        except DataError as error:
            problem = error.with_flags
    found, problem = world.share((found, problem))
    if found is None:
        raise DataError(problem)
    return found


def _which(measured: Measured, source: Source) -> str:
    if measured.pictures == source.pictures:
        return f"all {source.pictures:,} pictures"
    return f"{measured.pictures:,} of {source.pictures:,} pictures, an even sample"


def _compared(
    config: RunConfig, source: Source, world: World, statistics: Statistics, where: str
) -> list[str]:
    """A note where the pictures are nothing like the statistics that they are normalised with."""
    try:
        measured = _measured(config, source, world, COMPARED)
    except DataError:
        return []  # training names what it cannot read
    far = far_apart(statistics, measured.statistics)
    if not far:
        return []
    mean, std = map(in_words, measured.statistics)
    return [
        f"note: mean and deviation {where} are not those of such pictures in {len(far)} of "
        f"{len(statistics.mean)} channels: {_which(measured, source)} have mean {mean}, deviation "
        f"{std}; convmae stats measures --mean and --std (full scale is 1)"
    ]


def _share_statistics(model: nn.Module, config: RunConfig, world: World) -> list[str]:
    """Synchronises BatchNorms over the processes if that is to be; what to tell about it."""
    if not has_batch_norm(model):
        if config.sync_bn:
            return ["note: --sync_bn: the model has no BatchNorm, so there is nothing to share"]
        return []
    if not world.parallel:
        if config.sync_bn:
            return ["note: --sync_bn: there is one process, whose statistics are those of all"]
        return []
    if config.sync_bn is False:
        return ["note: --no_sync_bn: BatchNorms see the pictures of their own process alone"]
    left = share_statistics(model, world.device.type == "cpu")
    if not left:
        return ["BatchNorms share their statistics over the processes"]
    return [
        f"note: {', '.join(left)} cannot share statistics over the processes: they see the "
        "pictures of their own process alone"
    ]


def _prepare_model(model: Any, config: RunConfig, world: World) -> None:
    """Device, checkpointing of activations, compilation: before the model is spread."""
    model.to(world.device).train()
    if config.grad_checkpointing:
        try:
            model.set_grad_checkpointing(True)
        except ValueError as error:
            raise OptionError(f"--grad_checkpointing: {error}") from error
    mode = config.torchcompile
    if mode is None:
        return
    known = torch.compiler.list_backends(exclude_tags=())
    if mode != BLOCKS and mode not in known:
        raise OptionError(
            f"--torchcompile must be {BLOCKS}, which compiles block by block, or a backend for the "
            f"whole model, {', '.join(known)}; got {mode!r}"
        )
    # Blocks share the code of their class: one program for each size, in training and evaluation.
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(RECOMPILE_LIMIT, dynamo.recompile_limit)
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
    epochs = run.total_steps / run.steps_per_epoch
    notes = [
        f"{run.model_name}: {sum(p.numel() for p in run.model.parameters()) / 1e6:.2f} M "
        f"parameters, {config.size[0]} x {config.size[1]} pixels, {world.device}, "
        f"{str(run.dtype).removeprefix('torch.')} ({why}), {torch.get_num_threads()} threads",
        f"effective batch {effective} = {config.batch_size} x {config.accum_iter}{processes}, "
        f"blr {config.blr:g}, lr {peak:.3e} ({rule})",
        f"{epochs:g} epochs of {run.steps_per_epoch} steps, into {run.folder}",
    ]
    if config.warmup_epochs >= epochs:
        notes.append(
            f"warning: --warmup_epochs {config.warmup_epochs:g} is not shorter than "
            f"{config.length}: the learning rate only rises, to {_highest_rate(run):.3e} in the "
            f"last step, and never reaches its peak {peak:.3e}; give fewer --warmup_epochs, or 0"
        )
    return notes


def _highest_rate(run: Run) -> float:
    """The learning rate of the last step."""
    run.scheduler.step_update(run.total_steps - 1)
    return max(group["lr"] for group in run.optimizer.param_groups)


# -- the run's folder -----------------------------------------------------------------------------


def what_to_resume(config: RunConfig, folder: RunFolder) -> Path | None:
    """The checkpoint folder to go on from; refuses to write over another run."""
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


def _resume(
    run: Run, task: Task, folder: Path, weights: Weights, state: dict[str, Any]
) -> list[str]:
    """Gives weights, optimizer and progress of `folder` to `run`; what to tell about it."""
    config = run.config
    notes = task.resume_classes(config, weights)
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
        run.evaluation_pending = state.get("evaluation_pending", False)
        if run.scaler.is_enabled() and state["scaler"]:
            run.scaler.load_state_dict(state["scaler"])
        task.load_state(run, state["task"])
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise OptionError(f"--resume: {folder} does not fit this run: {error}") from error
    run.step = run.saved_step = round(done * run.steps_per_epoch)
    if run.step >= run.total_steps and config.resume != "auto":
        raise OptionError(
            f"{config.length}: {folder} has been trained for {done:g} epochs already; "
            "give more to go on"
        )
    notes.insert(0, f"going on from {folder}, epoch {done:.2f} (step {run.step})")
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
