"""Checkpoint, picture and report of a run, written by all its processes together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convmae.config import OptionError, config_to_mapping
from convmae.files import replacing
from convmae.seeds import SCHEME
from convmae.training.diagnosis import REMEDIES, not_finite, what_is_left
from convmae.training.distributed import whole_model, whole_optimizer
from convmae.training.machine import machine_info
from convmae.training.state import Run, TrainingError
from convmae.weights.checkpoint import save_checkpoint, save_weights
from convmae.weights.network_files import TIMM_WEIGHTS, write_timm_weights

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image as PILImage
    from torch import Tensor

    from convmae.data.classes import ClassNames
    from convmae.records.log import RunLog
    from convmae.training.task import Task


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
        "seeds": SCHEME,
        "steps_per_epoch": run.steps_per_epoch,
        "losses": list(run.losses),
        "nonfinite": run.nonfinite,
        "skipped": run.skipped,
        "evaluation_pending": run.evaluation_pending,
        "optimizer": whole_optimizer(run.model, run.optimizer),
        "scaler": run.scaler.state_dict(),
        "data": None if run.fingerprint is None else run.fingerprint.state(),
        "options": config_to_mapping(run.config),
        "task": task.state(run),
    }
    problem = run.world.share(_write(run, weights, state, task.classes) if run.world.main else None)
    if problem:
        raise TrainingError(problem)
    run.saved_step = run.step
    picture = task.draw(run)
    if run.world.main:
        _show(run, log, picture)


def save_best(run: Run, weights: dict[str, Tensor], classes: ClassNames | None = None) -> None:
    """Writes the best weights so far; every process takes part, the main one writes.

    Raises:
        TrainingError: the disk refused.
    """
    problem = None
    if run.world.main:
        described = (run.statistics, classes, run.reading)
        try:
            save_weights(run.folder.best, run.model, run.model_name, weights, *described)
        except OSError as error:
            problem = f"the best weights of step {run.step} could not be written: {error}"
    problem = run.world.share(problem)
    if problem:
        raise TrainingError(problem)


def write_description(run: Run, command: str) -> None:
    """Writes `args.yaml` and `environment.json`: versions, devices and processes, as text."""
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
    run.folder.write_options(config_to_mapping(run.config))
    run.folder.write_environment(entries)


def restore_folder(run: Run, task: Task, log: RunLog) -> None:
    """Makes the run's folder again, which somebody deleted; the checkpoint is left to `save`.

    Raises:
        TrainingError: it cannot be made, or another run is there.
    """
    problem = run.world.share(_remake(run, task, log) if run.lock is not None else None)
    if problem:
        raise TrainingError(problem)
    task.folder_lost(run)


def _remake(run: Run, task: Task, log: RunLog) -> str | None:
    """Makes the folder with log and options; what prevented it, in words."""
    assert run.lock is not None
    try:
        run.lock.renew()
        write_description(run, task.command)
        log.reopen()
    except (OptionError, OSError) as error:
        text = error.with_flags if isinstance(error, OptionError) else str(error)
        return (
            f"--output_dir {str(run.folder)!r} was deleted, and could not be made again: {text}; "
            f"{what_is_left(run)}"
        )
    log.event(
        "folder_lost",
        run.step,
        f"warning: --output_dir {str(run.folder)!r} was deleted while the run was going on; it is "
        "made again, with log, options and a checkpoint. Lost are pictures of earlier steps, "
        "TensorBoard's files and, until the next evaluation, the best weights",
    )
    return None


def _write(
    run: Run, weights: dict[str, Tensor], state: dict[str, Any], classes: ClassNames | None
) -> str | None:
    """Writes the checkpoint; what prevented it, in words."""
    broken = not_finite(weights)
    if broken:
        return (
            f"{len(broken)} parameters are not finite after step {run.step}, first {broken[0]}: "
            f"stopped without saving them; {what_is_left(run)}. {REMEDIES}"
        )
    try:
        save_checkpoint(
            run.folder.path,
            run.model,
            run.model_name,
            state,
            weights,
            run.statistics,
            classes,
            run.reading,
        )
        if "method" in run.model.config:  # of a network of timm, which timm is to read
            with replacing(run.folder.path / TIMM_WEIGHTS) as fresh:
                write_timm_weights(fresh, run.model, weights)
    except OSError as error:
        return (
            f"the checkpoint of step {run.step} could not be written: {error}; {what_is_left(run)}"
        )
    return None


def _show(run: Run, log: RunLog, picture: PILImage.Image | None) -> None:
    """Keeps the picture and the report; a disk that refuses them does not stop a run."""
    try:
        if picture is not None:
            log.picture(run.folder.drawn, _as_array(picture), run.step)
            run.report.add_picture(picture, run.step)
        run.report.write()
    except OSError as error:
        log.say(f"warning: pictures and report of step {run.step} were not written: {error}")


def _as_array(picture: PILImage.Image) -> np.ndarray:
    import numpy

    return numpy.asarray(picture)
