"""Checkpoint, picture and report of a run, written by all its processes together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convmae.config import config_to_mapping
from convmae.records.report import write_report
from convmae.seeds import SCHEME
from convmae.training.diagnosis import REMEDIES, not_finite, what_is_left
from convmae.training.distributed import whole_model, whole_optimizer
from convmae.training.state import Run, TrainingError
from convmae.weights.checkpoint import save_checkpoint

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image as PILImage
    from torch import Tensor

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
        "optimizer": whole_optimizer(run.model, run.optimizer),
        "scaler": run.scaler.state_dict(),
        "options": config_to_mapping(run.config),
        "task": task.state(run),
    }
    problem = run.world.share(_write(run, weights, state, task.classes) if run.world.main else None)
    if problem:
        raise TrainingError(problem)
    picture = task.draw(run)
    if run.world.main:
        _show(run, log, picture)


def _write(
    run: Run, weights: dict[str, Tensor], state: dict[str, Any], classes: tuple[str, ...] | None
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
    except OSError as error:
        return (
            f"the checkpoint of step {run.step} could not be written: {error}; {what_is_left(run)}"
        )
    return None


def _show(run: Run, log: RunLog, picture: PILImage.Image | None) -> None:
    """Keeps the picture and the report; a disk that refuses them does not stop a run."""
    from convmae.records.pictures import save_picture

    try:
        if picture is not None:
            log.picture("reconstruction", _as_array(picture), run.step)
            save_picture(picture, run.folder.step_picture(run.step))
            save_picture(picture, run.folder.picture)
        write_report(run.folder)
    except OSError as error:
        log.say(f"warning: pictures and report of step {run.step} were not written: {error}")


def _as_array(picture: PILImage.Image) -> np.ndarray:
    import numpy

    return numpy.asarray(picture)
