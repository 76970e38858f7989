"""What functions that look at several positions do with `MaskedDense`; plain PyTorch throughout."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from convmae_kernels.ops.support.arithmetic import multiply
from convmae_kernels.packed.axes import NCHW, NHWC
from convmae_kernels.packed.map_like import MapLike, handles
from convmae_kernels.packed.masked_dense import MaskedDense, highest
from convmae_kernels.packed.refused import WHY_REFUSED, refuse

if TYPE_CHECKING:
    from collections.abc import Callable

_handles = partial(handles, MaskedDense.handlers)
LOWEST = float("-inf")


class PaddedDense(MapLike):
    """The dense twin of `Padded`."""

    handlers: ClassVar[dict[Callable | str, Callable]] = {}
    axes = NCHW

    def __init__(self, source: MaskedDense, pads: list[tuple]) -> None:
        self.source = source
        self.pads = pads  # of `F.pad`: pad, mode, value

    def masked(self, hidden: float = 0.0) -> Tensor:
        """The padded map with `hidden` at hidden positions."""
        return self._padded(self.source.masked(hidden))

    def seen(self, like: bool) -> Tensor:
        """1 at visible positions and, but for constants if not `like`, at their padding; else 0."""
        return self._padded(self.source.visible().to(self.source.dtype), float(like))

    def _padded(self, values: Tensor, constant: float | None = None) -> Tensor:
        for pad, mode, value in self.pads:
            if mode == "constant":
                values = F.pad(values, pad, mode, value if constant is None else constant)
            else:
                values = F.pad(values, pad, mode)
        return values

    @property
    def shape(self) -> torch.Size:
        """Of the padded map."""
        return self.masked().shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the map."""
        return self.source.dtype

    @property
    def device(self) -> torch.device:
        """Of the map."""
        return self.source.device


def _handles_padded(*functions: Callable) -> Callable:
    def add(handler: Callable) -> Callable:
        handles(PaddedDense.handlers, *functions)(handler)
        return _handles(*functions)(handler)

    return add


def _padding(x: Any) -> PaddedDense:
    return x if isinstance(x, PaddedDense) else PaddedDense(x, [])


@_handles_padded(F.pad)
def _pad(func, input, pad, mode="constant", value=None):
    value = 0.0 if value is None else value
    padded = _padding(input)
    pad = [*pad, *[0] * 8][:8]
    positions = pad[2:6] if padded.source.axes == NHWC else pad[:4]
    if any(positions):
        return PaddedDense(padded.source, [*padded.pads, (pad[:4], mode, value)])
    return input.like(F.pad(input.values, pad[:6], mode, value)) if any(pad) else input


@_handles_padded(torch.conv2d, torch.conv_transpose2d)
def _convolution(func, input, weight, bias=None, *args, **kwargs):
    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return func(x, weight, bias, *args, **kwargs)

    padded = _padding(input)
    return padded.source.like(multiply(convolve, padded.masked(), weight, bias))


@_handles_padded(torch.max_pool2d, F.max_pool2d)
def _max_pool2d(func, input, *args, **kwargs):
    padded = _padding(input)
    counts = all(value > LOWEST for _, _, value in padded.pads)
    seen = func(padded.seen(counts), *args, **kwargs)
    y = highest(func(padded.masked(LOWEST), *args, **kwargs), seen)
    return padded.source.like(y).cleared()


@_handles_padded(torch._C._nn.avg_pool2d, F.avg_pool2d)
def _avg_pool2d(
    func,
    input,
    kernel_size,
    stride=None,
    padding=0,
    ceil_mode=False,
    count_include_pad=True,
    divisor_override=None,
):
    padded = _padding(input)
    stride = stride or kernel_size

    def sums(x: Tensor, padding: Any, divisor: int) -> Tensor:
        return F.avg_pool2d(x, kernel_size, stride, padding, ceil_mode, True, divisor)

    y = sums(padded.masked(), padding, divisor_override or 1)
    if divisor_override:
        return padded.source.like(y)
    seen = padded.seen(True)
    if count_include_pad:
        rows, columns = (padding, padding) if isinstance(padding, int) else (*padding, *padding)[:2]
        seen = F.pad(seen, (columns, columns, rows, rows), value=1.0)
        count = sums(seen, 0, 1)[:, :, : y.shape[2], : y.shape[3]]
    else:
        count = sums(seen, padding, 1)
    return padded.source.like(y / count.clamp_min(1))


@_handles(F.adaptive_avg_pool2d, torch._C._nn.adaptive_avg_pool2d)
def _adaptive_avg_pool2d(func, input, output_size):
    seen = func(input.visible().to(input.dtype), output_size)
    y = func(input.masked(), output_size) / torch.where(seen > 0, seen, 1)
    return y if y.shape[2:] == (1, 1) else input.like(y)


@_handles(F.adaptive_max_pool2d, torch._C._nn.adaptive_max_pool2d)
def _adaptive_max_pool2d(func, input, output_size, return_indices=False):
    seen = func(input.visible().to(input.dtype), output_size)
    y = highest(func(input.masked(LOWEST), output_size), seen)
    return y if y.shape[2:] == (1, 1) else input.like(y).cleared()


@_handles(F.interpolate)
def _interpolate(func, input, *args, **kwargs):
    y = input.like(func(input.masked(), *args, **kwargs))
    seen = func(input.visible().to(input.dtype), *args, **kwargs)
    return y.like(y.values / torch.where(y.visible(), seen, 1))


_handles_padded(*WHY_REFUSED)(refuse)
