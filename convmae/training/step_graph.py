"""A whole optimizer step as one CUDA graph: captured once, then replayed for every batch.

Replaying a graph is one launch in place of about a thousand, which is what small batches wait for.
The numbers are those of the loop without it: the first steps run eagerly, a step whose loss or
gradient is not finite changes nothing, and the learning rate follows its schedule.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from convmae_kernels import BlockMask
from convmae_kernels.ops.support.rows import joining_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from convmae.training.state import Run

    Capture = Callable[[Callable[[], None]], Callable[[], None]]

WARM_UP = 3  # eager steps before the capture, in which libraries choose kernels and allocate


def why_not(run: Run) -> str | None:
    """Why the steps of this run cannot be captured, and what to do; None if they can."""
    config, world = run.config, run.world
    if world.device.type != "cuda":
        return f"the device is {world.device}, and CUDA graphs need an NVIDIA GPU (--device cuda)"
    if world.parallel:
        return (
            f"there are {world.size} processes ({world.strategy}), and a capture covers one; start "
            "convmae without torchrun"
        )
    if config.accum_iter > 1:
        return (
            f"--accum_iter {config.accum_iter} adds up the gradients of several batches, and a "
            "capture covers one; give a larger --batch_size and --accum_iter 1"
        )
    if run.scaler.is_enabled():
        return "float16 scales its loss from step to step; give --amp bfloat16 or float32"
    if config.grad_checkpointing:
        return "--grad_checkpointing reads the states of random generators, which a capture forbids"
    if not isinstance(run.optimizer, torch.optim.AdamW):
        return (
            f"{type(run.optimizer).__name__} decides on the host in every step, which a capture "
            "does not repeat; give --opt adamw"
        )
    if config.weight_decay_end is not None:
        return (
            "the weight decay, which --weight_decay_end changes from step to step, is a number of "
            "the host, which a capture does not read again; leave it out"
        )
    return None


class StepGraph:
    """Runs steps of a run, eagerly at first and then as a graph.

    Args:
        optimizer: a fused one with `capturable` groups: AdamW.
        compute: given images and inputs as below, leaves gradients in the parameters and returns
            loss and norm, two scalars; all of it on the device.
        capture: gives a function that repeats what another does on the device; on a GPU it is
            `cuda_capture`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        compute: Callable[[Tensor, Any], tuple[Tensor, Tensor]],
        capture: Capture,
    ) -> None:
        self._optimizer, self._compute, self._capture = optimizer, compute, capture
        self._steps = 0
        self._replay: Callable[[], None] | None = None
        self._kept: list[Tensor] = []
        for group in optimizer.param_groups:
            group["capturable"] = True
        device = optimizer.param_groups[0]["params"][0].device
        self._rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self._loss_and_norm = torch.zeros(2, device=device)
        self._stream = torch.cuda.Stream() if device.type == "cuda" else None

    def __call__(self, images: Tensor, inputs: Any) -> tuple[float, float]:
        """One step; returns its loss and the norm of its gradient.

        Args:
            images: on the device and normalised.
            inputs: tensors and masks in any containers, of the same shapes in every step.

        Raises:
            GraphError: the step cannot be captured; nothing of it was done.
        """
        self._keep(images, inputs)
        for rate, group in zip(self._rates, self._optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        if self._replay is None and self._steps < WARM_UP:
            self._aside(self._step)
        else:
            if self._replay is None:
                try:
                    self._replay = self._capture(self._step)
                except RuntimeError as error:
                    reason = str(error).strip().splitlines()[0]
                    raise GraphError(f"the capture failed: {reason}") from error
            self._replay()
        self._steps += 1
        loss, norm = self._loss_and_norm.tolist()
        return loss, norm

    def close(self) -> None:
        """Leaves the optimizer as it was found."""
        for name in ("found_inf", "grad_scale"):
            if hasattr(self._optimizer, name):
                delattr(self._optimizer, name)
        self._optimizer.zero_grad(set_to_none=True)
        for group in self._optimizer.param_groups:
            group["capturable"] = False

    def _keep(self, images: Tensor, inputs: Any) -> None:
        """Copies what the step reads to where the graph reads it."""
        new, form = tree_flatten((images, inputs))
        ragged = isinstance(inputs, tuple | list) and any(
            isinstance(value, BlockMask) and value.visible_per_image is None for value in inputs
        )
        if ragged:
            raise GraphError(
                "the masks have different numbers of visible blocks, which change the sizes of a "
                "step; "
                "give masks with the same number in every image"
            )
        if not self._kept:
            self._kept, self._form = [value.clone() for value in new], form
            return
        shapes = [list(value.shape) for value in new]
        expected = [list(value.shape) for value in self._kept]
        if form != self._form or shapes != expected:
            raise GraphError(f"a batch has tensors of {shapes}, those before it had {expected}")
        for kept, value in zip(self._kept, new, strict=True):
            kept.copy_(value)

    def _step(self) -> None:
        """The step itself, all of it on the device; a gradient that is not finite is left out."""
        optimizer = self._optimizer
        optimizer.zero_grad(set_to_none=True)
        images, inputs = tree_unflatten(self._kept, self._form)
        with joining_rows():
            loss, norm = self._compute(images, inputs)
        self._loss_and_norm.copy_(torch.stack([loss.float(), norm.float()]))
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.found_inf = (~self._loss_and_norm.isfinite().all()).float()  # type: ignore[attr-defined]
        rates = [group["lr"] for group in optimizer.param_groups]
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate
        try:
            optimizer.step()
        finally:
            for group, number in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = number

    def _aside(self, step: Callable[[], None]) -> None:
        """Runs a step on a stream of its own, where there are streams: what a capture expects."""
        if self._stream is None:
            return step()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            step()
        torch.cuda.current_stream().wait_stream(self._stream)


class GraphError(RuntimeError):
    """A step cannot be captured; the message says why."""


def cuda_capture(function: Callable[[], None]) -> Callable[[], None]:
    """Captures what `function` does on the GPU, without doing it; the result does it."""
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the GPU meanwhile: the one that pins batches does.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        function()
    return graph.replay
