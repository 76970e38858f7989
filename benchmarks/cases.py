"""Every case of the benchmark: the packed way of doing something, against the dense way.

A case is a function `(setting, dtype) -> Comparison` under `@register`; the first line of its
docstring is what `--list` says. The dense opponents of the operators are plain PyTorch in
channels-last, eager and compiled; that of the models is `DenseConvMAE` with the same parameters.
"""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

import convmae_kernels as ck
from benchmarks import memory, models, work
from benchmarks.limits import clock_for
from benchmarks.registry import register
from benchmarks.runner import CapturedGraph, Comparison, Contender
from convmae_kernels import BlockMask
from convmae_kernels.ops.support.arithmetic import SLOW_ON_CPU
from convmae_kernels.ops.support.dispatch import Impl, why_not

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.setting import Setting

# -- operators ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """One way of computing an operator, and of its gradients if there is a `grad`.

    Attributes:
        forward: takes `inputs`.
        inputs: tensors.
        pack: the dense maps among the results to packed features, to compare them.
        grad: the gradient of the result, or None for the forward pass alone.
    """

    forward: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    pack: Callable[[Tensor], Tensor]
    grad: Tensor | None = None

    def run(self) -> tuple[Tensor, ...]:
        """The result, and the gradients of the inputs."""
        y = self.forward(*self.inputs)
        if self.grad is None:
            return (y,)
        return (y, *torch.autograd.grad(y, self.inputs, self.grad))

    def result(self, outputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Result and first input's gradient packed, the parameters' gradients as they are."""
        return [self.pack(t) for t in outputs[:2]] + list(outputs[2:])

    def contender(self, name: str) -> Contender:
        """This way, to be measured; on a GPU as a graph, so that launching it is not measured."""
        run = CapturedGraph(self.run) if self.inputs[0].is_cuda else self.run
        return Contender(name, run, self.result)


def _compare(
    setting: Setting, counted: work.Work, packed: Callable[[Impl], Way], dense: Way
) -> Comparison:
    """`packed` by "auto" and, where that is not Triton, by Triton, against `dense`."""
    contenders, notes = [packed("auto").contender("packed"), dense.contender("dense")], []
    probe = dense.inputs[0]
    if why_not("cuda", probe) is None and why_not("triton", probe) is None:
        contenders.append(packed("triton").contender("packed triton"))
    if setting.compile:
        reason = why_no_compile(setting.device)
        if reason is None:
            compiled = replace(dense, forward=torch.compile(dense.forward, dynamic=False))
            contenders.append(compiled.contender("dense compiled"))
        else:
            notes.append(f"dense compiled: left out, {reason}")
    return Comparison(contenders, counted, clock_for(setting.device), notes=notes)


def why_no_compile(device: torch.device) -> str | None:
    """Why `torch.compile` cannot work here; None if it can."""
    if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        return "torch.compile needs a C++ compiler, and there is none"
    return None


@dataclass(frozen=True)
class Sizes:
    """A feature map that is none of a stage's.

    Attributes:
        side: positions in a row of a block.
        channels: of the map.
        visible: share of visible blocks, in `(0, 1]`.
    """

    side: int
    channels: int
    visible: float


def feature_map(
    setting: Setting, dtype: torch.dtype, stage: int | Sizes
) -> tuple[Tensor, BlockMask, int, int]:
    """Dense features of a stage in channels-last, mask, block side and channels; stage 0: pixels.

    Pixels are NCHW-contiguous, as a data loader makes them.
    """
    if isinstance(stage, Sizes):
        mask, side, channels = setting.block_mask(stage.visible), stage.side, stage.channels
    else:
        mask, side = setting.block_mask(), (16, 4, 2)[stage]
        channels = 3 if stage == 0 else models.widths(setting.model)[stage - 1]
    gh, gw = mask.grid
    x = setting.randn(setting.batch_size, channels, gh * side, gw * side).to(dtype)
    if stage != 0:
        x = x.contiguous(memory_format=torch.channels_last)
    return x, mask, side, channels


def plain_gather(x: Tensor, index: tuple[Tensor, ...], side: int) -> Tensor:
    """`[B, C, gh*s, gw*s] -> [T, s, s, C]` by PyTorch's indexing, which copies what is visible."""
    tiles = x.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 3, 5, 1)
    return tiles[index]


def plain_scatter(x: Tensor, index: tuple[Tensor, ...], shape: Sequence[int]) -> Tensor:
    """`[T, s, s, C] -> [B, C, H, W]` channels-last by PyTorch's indexing, into zeros."""
    b, c, h, w = shape
    side = x.shape[1]
    y = x.new_zeros(b, h // side, side, w // side, side, c)
    y.transpose(2, 3)[index] = x
    return y.view(b, h, w, c).permute(0, 3, 1, 2)


def _raster(x: Tensor) -> Tensor:
    """`[T, s*s, C]` in Z-order to `[T, s, s, C]`."""
    return ck.from_zorder(x.transpose(1, 2)).permute(0, 2, 3, 1).contiguous()


def _zorder(x: Tensor) -> Tensor:
    """`[T, s, s, C]` to `[T, s*s, C]` in Z-order."""
    return ck.to_zorder(x.permute(0, 3, 1, 2)).transpose(1, 2)


@register("mask")
def mask_from_noise(setting: Setting, dtype: torch.dtype) -> Comparison:
    """Random mask and neighbour table, against the argsorts and gathers that MAE masks with."""
    noise, grid = setting.noise(), setting.grid
    keep = setting.block_mask().visible_per_image

    def packed() -> Tensor:
        return BlockMask.from_noise(noise, grid, setting.mask_ratio).visible.flatten(1)

    def dense() -> Tensor:
        ids_restore = noise.argsort(dim=1).argsort(dim=1)
        mask = torch.ones_like(noise)
        mask[:, :keep] = 0
        return mask.gather(1, ids_restore)

    capture = CapturedGraph if noise.is_cuda else lambda run: run
    contenders = [
        Contender("packed", capture(packed), lambda visible: [1 - visible.float()]),
        Contender("dense", capture(dense), lambda mask: [mask]),
    ]
    counted = work.mask_work(setting.block_mask())
    return Comparison(contenders, counted, clock_for(setting.device))


@register("gather/stage2", stage=2)
@register("gather/stage1", stage=1)
@register("gather/images", stage=0)
def gather(setting: Setting, dtype: torch.dtype, stage: int | Sizes) -> Comparison:
    """Visible blocks of pixels or features to packed features, against PyTorch's indexing."""
    x, mask, side, channels = feature_map(setting, dtype, stage)
    index = mask.visible.nonzero().unbind(1)

    def packed(impl: Impl) -> Way:
        return Way(lambda x: ck.gather_visible(x, mask, impl=impl), (x,), lambda y: y)

    dense = Way(lambda x: plain_gather(x, index, side), (x,), _zorder)
    return _compare(setting, work.gather_work(mask, side, channels, dtype), packed, dense)


@register("scatter/stage2", stage=2)
@register("scatter/stage1", stage=1)
def scatter(setting: Setting, dtype: torch.dtype, stage: int | Sizes) -> Comparison:
    """Packed features to a dense map, against PyTorch's indexing into zeros."""
    x, mask, side, channels = feature_map(setting, dtype, stage)
    index = mask.visible.nonzero().unbind(1)
    rows = ck.gather_visible(x, mask)

    def packed(impl: Impl) -> Way:
        return Way(lambda rows: ck.scatter_visible(rows, mask, impl=impl), (rows,), lambda y: y)

    dense = Way(lambda t: plain_scatter(t, index, x.shape), (_raster(rows),), lambda y: y)
    return _compare(setting, work.scatter_work(mask, side, channels, dtype), packed, dense)


@register("depthwise/7x7/forward_backward", stage=1, backward=True, kernel=7)
@register("depthwise/7x7/forward", stage=1, backward=False, kernel=7)
@register("depthwise/stage2/forward_backward", stage=2, backward=True)
@register("depthwise/stage2/forward", stage=2, backward=False)
@register("depthwise/stage1/forward_backward", stage=1, backward=True)
@register("depthwise/stage1/forward", stage=1, backward=False)
def depthwise(
    setting: Setting,
    dtype: torch.dtype,
    stage: int | Sizes,
    backward: bool,
    kernel: int = work.KERNEL,
) -> Comparison:
    """Depthwise convolution of packed features, against `conv2d` of the map, zeros where hidden.

    5x5 as in ConvMAE, or 7x7 with the channels of stage 1. Multiplying by the mask is not timed;
    backward has the gradients of input, weight and bias.
    """
    x, mask, side, channels = feature_map(setting, dtype, stage)
    visible = mask.to_dense(side)
    grad = setting.randn(*x.shape, seed=2).to(x)
    x, grad = ((t * visible).contiguous(memory_format=torch.channels_last) for t in (x, grad))
    weight = setting.randn(channels, 1, kernel, kernel).to(dtype) / kernel
    bias = setting.randn(channels).to(dtype)

    def dense_forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return conv2d(x, weight, bias, padding=kernel // 2, groups=channels)

    def inputs(features: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.detach().clone().requires_grad_(backward) for t in (features, weight, bias))

    pack = partial(ck.gather_visible, mask=mask)

    def packed(impl: Impl) -> Way:
        forward = partial(ck.masked_conv2d, mask=mask, groups=channels, impl=impl)
        return Way(forward, inputs(pack(x)), lambda y: y, pack(grad) if backward else None)

    dense = Way(dense_forward, inputs(x), pack, grad if backward else None)
    counted = work.depthwise_work(mask, side, channels, dtype, backward, kernel)
    return _compare(setting, counted, packed, dense)


@register("strided/forward_backward", backward=True)
@register("strided/forward", backward=False)
def strided(setting: Setting, dtype: torch.dtype, backward: bool) -> Comparison:
    """Depthwise 3x3 with stride 2 of packed features, against `conv2d` of the map x mask.

    Blocks have a side of 8 positions and 96 channels. Backward has the gradients of input, weight
    and bias.
    """
    mask, side, channels, kernel, stride = setting.block_mask(), 8, 96, 3, 2
    gh, gw = mask.grid

    def dense_map(side: int, seed: int) -> Tensor:
        x = setting.randn(setting.batch_size, channels, gh * side, gw * side, seed=seed).to(dtype)
        return (x * mask.to_dense(side)).contiguous(memory_format=torch.channels_last)

    x, grad = dense_map(side, 1), dense_map(side // stride, 2)
    weight = setting.randn(channels, 1, kernel, kernel).to(dtype) / kernel
    bias = setting.randn(channels).to(dtype)

    def dense_forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return conv2d(x, weight, bias, stride, padding=1, groups=channels)

    def inputs(features: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.detach().clone().requires_grad_(backward) for t in (features, weight, bias))

    pack = partial(ck.gather_visible, mask=mask)

    def packed(impl: Impl) -> Way:
        forward = partial(
            ck.masked_conv2d, mask=mask, stride=stride, groups=channels, padding=1, impl=impl
        )
        return Way(forward, inputs(pack(x)), lambda y: y, pack(grad) if backward else None)

    dense = Way(dense_forward, inputs(x), pack, grad if backward else None)
    counted = work.strided_work(mask, side, channels, kernel, stride, dtype, backward)
    return _compare(setting, counted, packed, dense)


# -- models ---------------------------------------------------------------------------------------


def _model_contenders(
    setting: Setting, dtype: torch.dtype
) -> tuple[list[tuple[str, str, bool]], list[str]]:
    """`(name, contender, compiled)` of every contender, and notes about them."""
    eager = [("packed", "packed", False), ("dense", "dense", False)]
    notes = []
    if setting.device.type == "cpu" and dtype in SLOW_ON_CPU:
        name = str(dtype).removeprefix("torch.")
        notes.append(f"models in {name}: this CPU has no such products, both multiply in float32")
    reason: str | None = "ask for them with --compile-models"
    if setting.compile_models:
        reason = why_no_compile(setting.device)
    if reason is not None:
        return eager, [*notes, f"compiled models: left out, {reason}"]
    return [*eager, ("packed compiled", "packed", True), ("dense compiled", "dense", True)], notes


@register("stages12")
def stages12(setting: Setting, dtype: torch.dtype) -> Comparison:
    """Stages 1 and 2 and the fusion convolutions, forward and backward, against the dense model."""
    mask, pixels = setting.block_mask(), models.images(setting)
    names, notes = _model_contenders(setting, dtype)
    contenders = []
    for name, kind, compiled in names:
        model = models.build(setting, kind)
        run = models.stages_pass(model, setting, dtype, mask, compiled)
        grads = models.stages_grads(model, setting, dtype, mask)
        result = partial(_stages_result, model, mask if kind == "dense" else None)
        contenders.append(Contender(name, partial(run, pixels, grads), result))
    known = models.parameters(setting.model)
    parameters = {key: p for key, p in known.items() if key.split(".")[0] in work.STAGES12}
    visible_pixels = mask.num_visible * pixels[0].numel() // math.prod(mask.grid)
    counted = work.training_work(parameters, mask, visible_pixels, optimizer=False)
    return Comparison(contenders, counted, clock_for(setting.device), notes=notes)


def _stages_result(
    model: nn.Module, mask: BlockMask | None, outputs: Sequence[Tensor]
) -> list[Tensor]:
    """The outputs packed (with a `mask` they are dense), and the norms of the gradients."""
    packed = outputs if mask is None else [models.pack(y, mask) for y in outputs]
    return [*packed, models.gradient_norms(model)]


@register("step")
def step(setting: Setting, dtype: torch.dtype) -> Comparison:
    """A whole training step (forward, backward, AdamW), against the dense model's."""
    pixels, noise = models.images(setting), setting.noise()
    names, notes = _model_contenders(setting, dtype)
    contenders = []

    def add(name: str, model: nn.Module, run: Callable[[Tensor, Tensor], Tensor]) -> None:
        contenders.append(
            Contender(name, partial(run, pixels, noise), partial(_step_result, model))
        )

    for name, kind, compiled in names:
        model = models.build(setting, kind)
        add(name, model, models.training_step(model, setting, dtype, compiled))
    if setting.compile_blocks:
        model = models.build(setting, "packed")
        model.compile_blocks()
        add("packed blocks", model, models.training_step(model, setting, dtype))
    if setting.device.type == "cuda":
        model = models.build(setting, "packed")
        add("packed graph", model, models.CapturedStep(model, setting, dtype))
    parameters = models.parameters(setting.model)
    counted = work.training_work(parameters, setting.block_mask(), pixels.numel(), optimizer=True)
    return Comparison(contenders, counted, clock_for(setting.device), notes=notes)


@register("mae")
def step_against_mae(setting: Setting, dtype: torch.dtype) -> Comparison:
    """A whole training step of ConvMAE, against one of MAE with a ViT-B: other work, same use."""
    pixels, noise = models.images(setting), setting.noise()
    contenders = []
    for name, model in (
        ("packed", models.build(setting, "packed")),
        ("MAE ViT-B", models.build_mae(setting)),
    ):
        run = partial(models.training_step(model, setting, dtype), pixels, noise)
        contenders.append(Contender(name, run, lambda loss: []))  # nothing to agree on
    parameters = models.parameters(setting.model)
    counted = work.training_work(parameters, setting.block_mask(), pixels.numel(), optimizer=True)
    return Comparison(contenders, counted, clock_for(setting.device), baseline="MAE ViT-B")


@register("joined")
def step_joined(setting: Setting, dtype: torch.dtype) -> Comparison:
    """A whole training step with the ops on rows, against PyTorch's ops in their place."""
    pixels, noise = models.images(setting), setting.noise()
    contenders = []
    for way in ("", " graph") if setting.device.type == "cuda" else ("",):
        for name in ("joined", "apart"):
            model = models.build(setting, "packed")
            if way:
                step = models.CapturedStep(model, setting, dtype, is_joined=name == "joined")
            else:
                step = models.training_step(model, setting, dtype)
                step = models.joined(step) if name == "joined" else step
            run = partial(step, pixels, noise)
            contenders.append(Contender(name + way, run, partial(_step_result, model)))
    parameters = models.parameters(setting.model)
    counted = work.training_work(parameters, setting.block_mask(), pixels.numel(), optimizer=True)
    return Comparison(contenders, counted, clock_for(setting.device), baseline="apart")


def _step_result(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return [loss, models.gradient_norms(model)]


@cache
def _idle(setting: Setting) -> int:
    """MiB of a process that takes no step; no matter in which dtype."""
    peak = memory.measure_peak(setting, torch.float32, "packed", steps=False)
    return round(peak.bytes / 2**20)


@register("memory")
def peak_memory(setting: Setting, dtype: torch.dtype) -> Comparison:
    """Peak memory of a fresh process taking training steps, against the dense model's.

    The limit is the parameters with their gradients and AdamW's two moments, in float32.
    """

    def read(run: Callable[[], Any]) -> tuple[float, Any]:
        peak = run()
        return peak.bytes / 2**20, peak

    contenders = [
        Contender(
            kind,
            partial(memory.measure_peak, setting, dtype, kind),
            lambda peak: [torch.tensor(peak.loss)],
        )
        for kind in ("packed", "dense")
    ]
    trainable = sum(p.numel() for p in models.parameters(setting.model).values() if p.requires_grad)
    notes = [f"memory: a process that builds the model and takes no step has {_idle(setting)} MiB"]
    counted = work.Work(4 * 4 * trainable)
    return Comparison(
        contenders, counted, read, unit="MiB", max_rounds=1, warm_up=False, notes=notes
    )
