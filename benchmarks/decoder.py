"""Cases of SparK's dense decoder: what saves operations exactly, against the plain modules.

Width 768, blocks of 32 pixels, 60 % hidden; forward and backward, with the gradients of features,
token, weights and biases. "packed" is the saving, "dense" what the modules would do by themselves.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d

from benchmarks import work
from benchmarks.limits import clock_for
from benchmarks.networks import BLOCK, network_mask
from benchmarks.registry import register
from benchmarks.runner import Comparison, Contender
from convmae.models.cnn.merged_up_sampling import (
    merged_up_sample_and_convolve,
    pair_macs,
    plain_up_sample_and_convolve,
)
from convmae.models.cnn.visible_convolution import (
    convolve_with_token,
    fill_with_token,
    project_with_token,
    up_sample_with_token,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.setting import Setting

WIDTH = 768
# Channels of the maps that a network hands to the decoder, coarsest first.
ENCODERS = {"resnet50": (2048, 1024, 512, 256), "convnext_tiny": (768, 384, 192, 96)}


def _compare(
    setting: Setting,
    inputs: Sequence[Tensor],
    packed: Callable[..., Tensor],
    dense: Callable[..., Tensor],
    macs: int,
) -> Comparison:
    """Two functions of `inputs`, and the gradients of all of these, at the price of `macs`."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.no_grad():
        outputs = dense(*leaves)
    grad = setting.randn(*outputs.shape, seed=2).to(outputs)
    grad = grad.contiguous(memory_format=torch.channels_last)

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    contenders = [
        Contender("packed", partial(run, packed), list),
        Contender("dense", partial(run, dense), list),
    ]
    moved = 3 * sum(x.numel() for x in inputs) + 2 * outputs.numel()
    flops = 3 * 2 * macs
    counted = work.Work(moved * outputs.element_size(), flops, flops)
    return Comparison(contenders, counted, clock_for(setting.device))


def _tensors(
    setting: Setting, dtype: torch.dtype, *shapes: tuple[int, ...], scales: Sequence[float]
) -> list[Tensor]:
    return [
        (setting.randn(*shape, seed=3 + number) * scale).to(dtype)
        for number, (shape, scale) in enumerate(zip(shapes, scales))
    ]


def densify(setting: Setting, dtype: torch.dtype, network: str, level: int) -> Comparison:
    """A 3x3 projection to the decoder's width, of a map with a token at hidden positions."""
    mask, side = network_mask(setting), 2**level
    inside, outside = ENCODERS[network][level], WIDTH >> level
    features, token, weight, bias = _tensors(
        setting,
        dtype,
        (mask.num_visible, side * side, inside),
        (inside,),
        (outside, inside, 3, 3),
        (outside,),
        scales=(1, 1, (9 * inside) ** -0.5, 1),
    )

    def packed(features: Tensor, token: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return convolve_with_token(features, mask, token, weight, bias)

    def dense(features: Tensor, token: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return conv2d(fill_with_token(features, mask, token), weight, bias, padding=1)

    macs = mask.num_visible * side * side * weight.numel()
    return _compare(setting, (features, token, weight, bias), packed, dense, macs)


def first(setting: Setting, dtype: torch.dtype, network: str) -> Comparison:
    """The coarsest level: its 1x1 projection, if the widths differ, and the first up-sampling."""
    mask, inside = network_mask(setting), ENCODERS[network][0]
    features, token, up_weight, up_bias = _tensors(
        setting,
        dtype,
        (mask.num_visible, 1, inside),
        (inside,),
        (WIDTH, WIDTH, 4, 4),
        (WIDTH,),
        scales=(1, 1, (4 * WIDTH) ** -0.5, 1),
    )
    projection = _tensors(
        setting, dtype, (WIDTH, inside, 1, 1), (WIDTH,), scales=(inside**-0.5, 1)
    )  # fmt: skip
    projection = projection if inside != WIDTH else []

    def packed(
        features: Tensor, token: Tensor, up_weight: Tensor, up_bias: Tensor, *projection: Tensor
    ) -> Tensor:
        if projection:
            features, token = project_with_token(features, token, *projection)
        return up_sample_with_token(features, mask, token, up_weight, up_bias)

    def dense(
        features: Tensor, token: Tensor, up_weight: Tensor, up_bias: Tensor, *projection: Tensor
    ) -> Tensor:
        maps = fill_with_token(features, mask, token)
        if projection:
            maps = conv2d(maps, *projection)
        return conv_transpose2d(maps, up_weight, up_bias, 2, padding=1)

    weights = up_weight.numel() + (projection[0].numel() if projection else 0)
    inputs = (features, token, up_weight, up_bias, *projection)
    return _compare(setting, inputs, packed, dense, mask.num_visible * weights)


def merged(setting: Setting, dtype: torch.dtype, channels: int) -> Comparison:
    """An up-sampling and the 3x3 convolution behind it, composed into one convolution."""
    side = setting.img_size // BLOCK * (WIDTH // channels)
    inputs = _tensors(
        setting,
        dtype,
        (setting.batch_size, channels, side, side),
        (channels, channels, 4, 4),
        (channels,),
        (channels, channels, 3, 3),
        scales=(1, (4 * channels) ** -0.5, 1, (9 * channels) ** -0.5),
    )
    inputs[0] = inputs[0].contiguous(memory_format=torch.channels_last)
    macs = min(pair_macs(setting.batch_size, side, side, channels, channels, channels))
    ways = merged_up_sample_and_convolve, plain_up_sample_and_convolve
    return _compare(setting, inputs, *ways, macs)


for _network, _widths in ENCODERS.items():
    register(f"decoder/{_network}/first", emulated=False, network=_network)(first)
    for _level in range(1, len(_widths)):
        _name = f"decoder/{_network}/densify{_level}"
        register(_name, emulated=False, network=_network, level=_level)(densify)
for _channels in (384, 192, 96, 48):
    register(f"decoder/merged/{_channels}", emulated=False, channels=_channels)(merged)
