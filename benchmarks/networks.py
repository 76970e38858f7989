"""Cases of ordinary convolutional networks and their layers: packed, against dense-times-mask.

Blocks of 32 pixels, 60 % hidden, as masked pretraining of convolutional networks has it; forward
and backward. The dense opponent multiplies by the mask before whatever looks at neighbours, and its
norms see visible positions only.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d
from torch.utils.flop_counter import FlopCounterMode

import convmae_kernels as ck
from benchmarks import memory, models, work
from benchmarks.limits import clock_for
from benchmarks.registry import register
from benchmarks.runner import Comparison, Contender
from convmae_kernels.packed import MaskedDense
from convmae_kernels.packed.equivalence import visible_values

if TYPE_CHECKING:
    from benchmarks.setting import Setting

BLOCK, MASK_RATIO = 32, 0.6  # pixels; share of hidden blocks
NETWORKS = ("resnet50", "convnext_tiny")  # of timm


def network_mask(setting: Setting, visible: float | None = None) -> ck.BlockMask:
    """The mask of the network cases, or one that shows this share of the blocks, in `(0, 1]`."""
    grid = (setting.img_size // BLOCK,) * 2
    noise = torch.rand(setting.batch_size, grid[0] ** 2, generator=torch.Generator().manual_seed(0))
    noise = noise.to(setting.device)
    if visible is None:
        return ck.BlockMask.from_noise(noise, grid, MASK_RATIO)
    return ck.BlockMask.from_noise(noise, grid, 1 - visible, "round")


def build(name: str, setting: Setting) -> nn.Module:
    """timm's network in training mode, channels-last, without its head."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0)
    return model.to(setting.device, memory_format=torch.channels_last).train()


class ForwardBackward:
    """Features of the visible blocks; gradients of a fixed function of them are in the model."""

    def __init__(
        self, model: nn.Module, setting: Setting, dtype: torch.dtype, kind: str, mask: ck.BlockMask
    ) -> None:
        self.model, self.setting, self.dtype, self.kind, self.mask = (
            model,
            setting,
            dtype,
            kind,
            mask,
        )
        self.images = models.images(setting).contiguous(memory_format=torch.channels_last)
        self.grad: Tensor | None = None

    def __call__(self) -> list[Tensor]:
        take = ck.Packed.gather if self.kind == "packed" else MaskedDense
        with models.autocast(self.setting, self.dtype):
            (features,) = visible_values(self.model.forward_features(take(self.images, self.mask)))
        if self.grad is None:
            self.grad = self.setting.randn(*features.shape, seed=2).to(features)
        self.model.zero_grad()
        features.backward(self.grad)
        return [features.detach()]


def network(setting: Setting, dtype: torch.dtype, network_name: str) -> Comparison:
    """A network of timm, unmodified, forward and backward, against dense-times-mask."""
    mask, contenders = network_mask(setting), []
    for kind in ("packed", "dense"):
        model = build(network_name, setting)
        run = ForwardBackward(model, setting, dtype, kind, mask)
        contenders.append(
            Contender(
                kind, run, lambda y, model=model: [*y, models.gradient_norms(model).norm()[None]]
            )
        )
    counted = network_work(build(network_name, setting), setting, mask)
    return Comparison(contenders, counted, clock_for(setting.device))


def network_work(model: nn.Module, setting: Setting, mask: ck.BlockMask) -> work.Work:
    """Convolutions and products of visible outputs, all taps; backward is twice forward, less the
    gradient of the images."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.forward_features(models.images(setting))
    stem = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    outputs = setting.batch_size * (setting.img_size // stem.stride[0]) ** 2
    dense = 3 * counter.get_total_flops() - 2 * outputs * stem.weight.numel()
    flops = int(dense * mask.density)
    return work.Work(3 * 4 * sum(p.numel() for p in model.parameters()), flops, flops)


def network_memory(setting: Setting, dtype: torch.dtype, network_name: str) -> Comparison:
    """What a network of timm takes of memory, forward and backward, beside its parameters.

    Peak of a fresh process less that of one that only builds the network. The limit is the
    gradients of the parameters, in float32.
    """
    parameters = sum(p.numel() for p in build(network_name, setting).parameters())
    return process_memory(setting, dtype, network_name, 4 * parameters)


def process_memory(setting: Setting, dtype: torch.dtype, name: str, least: int) -> Comparison:
    """Peak of a fresh process that runs `name`, less that of one that only builds it.

    Args:
        setting, dtype: of the benchmark.
        name: as `memory.measure_peak` takes it.
        least: bytes that it must have besides.
    """
    measure = partial(memory.measure_peak, setting, dtype, network=name)
    idle = measure(contender="packed", steps=False).bytes

    def read(run):
        peak = run()
        return (peak.bytes - idle) / 2**20, peak

    contenders = [
        Contender(kind, partial(measure, contender=kind), lambda peak: [torch.tensor(peak.loss)])
        for kind in ("packed", "dense")
    ]
    notes = [f"memory: a process that only builds {name} has {idle / 2**20:.0f} MiB"]
    return Comparison(
        contenders, work.Work(least), read, unit="MiB", max_rounds=1, warm_up=False, notes=notes
    )


if importlib.util.find_spec("timm") is not None:
    for _name in NETWORKS:
        register(f"network/{_name}/memory", emulated=False, network_name=_name)(network_memory)
        register(f"network/{_name}", emulated=False, network_name=_name)(network)


# -- layers ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A convolution of a map of `side` positions in a row, of images of 224 pixels."""

    in_channels: int
    out_channels: int
    kernel: int
    side: int
    stride: int = 1
    groups: int = 1


LAYERS = {
    "stem7x7s2": Layer(3, 64, 7, 224, stride=2),
    "patch4x4s4": Layer(3, 96, 4, 224, stride=4),
    "conv3x3/64": Layer(64, 64, 3, 56),
    "conv3x3/128": Layer(128, 128, 3, 28),
    "conv3x3/256": Layer(256, 256, 3, 14),
    "conv3x3/512": Layer(512, 512, 3, 7),
    "conv3x3s2/128": Layer(128, 128, 3, 56, stride=2),
    "conv3x3s2/512": Layer(512, 512, 3, 14, stride=2),
    "conv1x1/256": Layer(256, 64, 1, 56),
    "conv1x1s2/512": Layer(256, 512, 1, 56, stride=2),
    "grouped3x3/104": Layer(104, 104, 3, 28, groups=13),
    "grouped3x3/128": Layer(128, 128, 3, 56, groups=32),
    "grouped3x3/256": Layer(256, 256, 3, 28, groups=16),
    "grouped3x3/512": Layer(512, 512, 3, 14, groups=8),
    "grouped3x3/1024": Layer(1024, 1024, 3, 7, groups=32),
    "grouped3x3s2/256": Layer(256, 256, 3, 56, stride=2, groups=32),
    "grouped3x3s2/448": Layer(448, 448, 3, 28, stride=2, groups=8),
    "depthwise7x7/96": Layer(96, 96, 7, 56, groups=96),
    "depthwise7x7/384": Layer(384, 384, 7, 14, groups=384),
    "depthwise7x7/768": Layer(768, 768, 7, 7, groups=768),
    "depthwise3x3s2/96": Layer(96, 96, 3, 112, stride=2, groups=96),
}


def layer(
    setting: Setting, dtype: torch.dtype, shape: Layer, visible: float | None = None
) -> Comparison:
    """One convolution of packed features, forward and backward, against that of the map x mask."""
    mask, scale = network_mask(setting, visible), setting.img_size / 224
    side = max(round(shape.side * scale), mask.grid[0])
    maps = setting.randn(setting.batch_size, shape.in_channels, side, side).to(dtype)
    shown = mask.to_dense(side // mask.grid[0])
    maps = maps.contiguous(memory_format=torch.channels_last)
    fan_in = shape.in_channels // shape.groups * shape.kernel**2
    weight = setting.randn(shape.out_channels, fan_in).to(dtype) / fan_in**0.5
    weight = weight.view(shape.out_channels, -1, shape.kernel, shape.kernel)
    padding = (shape.kernel - shape.stride + 1) // 2 if shape.kernel > shape.stride else 0
    is_first = shape.in_channels == 3  # of images no gradient is wanted

    def run(forward, x: Tensor) -> list[Tensor]:
        x, w = x.detach().requires_grad_(not is_first), weight.detach().requires_grad_()
        y = forward(x, w)
        grads = torch.autograd.grad(y, (w,) if is_first else (w, x), torch.ones_like(y))
        return [y.detach(), *grads]

    def packed(x: Tensor, w: Tensor) -> Tensor:
        return ck.masked_conv2d(x, w, None, mask, shape.stride, 1, shape.groups, padding=padding)

    def dense(x: Tensor, w: Tensor) -> Tensor:
        y = conv2d(x * shown, w, None, shape.stride, padding, 1, shape.groups)
        return y * mask.to_dense(y.shape[2] // mask.grid[0])

    def as_packed(results: list[Tensor]) -> list[Tensor]:
        return [ck.gather_visible(t, mask) if i != 1 else t for i, t in enumerate(results)]

    features = ck.gather_visible(maps, mask)
    contenders = [
        Contender("packed", partial(run, packed, features), lambda results: results),
        Contender("dense", partial(run, dense, maps), as_packed),
    ]
    outputs = mask.num_visible * (side // mask.grid[0] // shape.stride) ** 2
    passes = 2 if is_first else 3
    flops = 2 * passes * outputs * shape.out_channels * fan_in
    moved = passes * features.numel() + 2 * outputs * shape.out_channels + 3 * weight.numel()
    matmul = 0 if shape.groups == shape.in_channels else flops
    counted = work.Work(moved * dtype.itemsize, flops, matmul)
    return Comparison(contenders, counted, clock_for(setting.device))


for _name, _layer in LAYERS.items():
    register(f"layer/{_name}", emulated=False, shape=_layer)(layer)


def drop_in(setting: Setting, dtype: torch.dtype, density: float) -> Comparison:
    """`nn.MaskedConv2d` 3x3, 256 channels, 28 x 28, 16 maps in and out, against the map x mask."""
    batch, channels, side, grid = 16, 256, 28, 7
    noise = torch.rand(batch, grid**2, generator=torch.Generator().manual_seed(0))
    noise = noise.to(setting.device)
    mask = (
        ck.BlockMask.full(batch, (grid, grid), setting.device)
        if density == 1
        else ck.BlockMask.from_noise(noise, (grid, grid), 1 - density)
    )
    visible = mask.to_dense(side // grid).to(dtype)
    torch.manual_seed(0)
    conv = ck.nn.MaskedConv2d(channels, channels, 3).to(setting.device, dtype)
    x, grad = (
        setting.randn(batch, channels, side, side, seed=seed)
        .to(dtype)
        .contiguous(memory_format=torch.channels_last)
        for seed in (1, 2)
    )
    x = x.requires_grad_()
    assert conv.bias is not None
    inputs = (x, conv.weight, conv.bias)

    def run(forward) -> list[Tensor]:
        y = forward()
        return [y.detach(), *torch.autograd.grad(y, inputs, grad)]

    def dense() -> Tensor:
        return conv2d(x * visible, conv.weight, conv.bias, padding=1) * visible

    contenders = [
        Contender("packed", partial(run, lambda: conv(x, mask)), lambda results: results),
        Contender("dense", partial(run, dense), lambda results: results),
    ]
    positions = mask.num_visible * (side // grid) ** 2
    flops = 3 * 2 * positions * 9 * channels**2
    moved = (3 * positions + 2 * x.numel() // channels) * channels + 3 * conv.weight.numel()
    counted = work.Work(moved * dtype.itemsize, flops, flops)
    return Comparison(contenders, counted, clock_for(setting.device))


register("drop_in/full", emulated=False, density=1.0)(drop_in)
register("drop_in/quarter", emulated=False, density=0.25)(drop_in)
