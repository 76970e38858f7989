"""Why a run has to stop: where infinity or NaN first appears, and what is left of the run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from convmae.data import normalise
from convmae.training.distributed import whole_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from convmae.training.state import Run
    from convmae.training.step import StepResult
    from convmae.training.task import Task

REMEDIES = "Try a lower --blr, more --warmup_epochs, --clip_grad 1 or --amp float32"


def diagnose(run: Run, task: Task, outcome: StepResult) -> str:
    """Where infinity or NaN first appears when the last batch is computed once more."""
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            bad = any(
                isinstance(t, torch.Tensor) and not bool(torch.isfinite(t).all()) for t in tensors
            )
            if bad and not found:
                found.append(name or "the loss itself")

        return hook

    handles = [m.register_forward_hook(look(name)) for name, m in run.model.named_modules()]
    images = normalise(outcome.batch.images.to(run.world.device), *run.statistics)
    try:
        with torch.no_grad(), run.autocast():
            task.loss(run, outcome.batch, images)
    finally:
        for handle in handles:
            handle.remove()
    broken = not_finite(whole_model(run.model))
    causes = []
    if not bool(torch.isfinite(images).all()):
        causes.append("the pictures of the last batch are not finite")
    if broken:
        causes.append(f"{len(broken)} parameters are not finite, first {broken[0]}")
    if found and not broken:
        causes.append(f"in the forward pass the first output that is not finite is of {found[0]}")
    if not causes:
        causes.append("pictures, parameters and outputs are finite: the gradient is not")
    what = "loss" if not math.isfinite(outcome.loss) else "gradient"
    return (
        f"the {what} is not finite at step {run.step} of {run.total_steps} (epoch {run.epoch:.2f}, "
        f"lr {outcome.lr:.3e}, {str(run.dtype).removeprefix('torch.')}), the "
        f"{run.nonfinite} steps in a row that --max_nonfinite allows: {'; '.join(causes)}. "
        f"Stopped; {what_is_left(run)}. {REMEDIES}"
    )


def not_finite(weights: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that hold an infinity or a NaN."""
    return [
        name
        for name, value in weights.items()
        if value.is_floating_point() and not bool(torch.isfinite(value).all())
    ]


def what_is_left(run: Run) -> str:
    """What a run that has to stop leaves to go on from, in words."""
    folder = run.folder.checkpoint
    if not folder.exists():
        return "none was saved"
    if run.saved_step == run.step:
        return (
            f"the state after step {run.step} is saved in {folder}; --resume auto goes on from it"
        )
    return f"the checkpoint before is intact in {folder} (step {run.saved_step})"
