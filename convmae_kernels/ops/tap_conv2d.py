"""Convolution of packed features tap by tap, and its two gradients: matrix products on a CPU.

Each tap is one product, of those inputs alone that are visible where an output looks: neither the
products with hidden positions nor a copy of every output's surroundings are made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from convmae_kernels.ops import gather_windows  # noqa: F401  (registers the op)
from convmae_kernels.ops.support.derivatives import derivatives_of_convolution
from convmae_kernels.ops.support.dispatch import register
from convmae_kernels.ops.support.flops import (
    grouped_input_flops,
    grouped_weight_flops,
    window_flops,
)
from convmae_kernels.ops.support.geometry import window_halo
from convmae_kernels.ops.support.windows import patches_of_windows
from convmae_kernels.zorder import block_side

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LEAST_CHANNELS = 64  # of inputs and outputs; products of fewer are slower than copies


class _Tap(NamedTuple):
    """The outputs that see something through a tap, and what they see.

    Attributes:
        number: of the tap, row by row.
        outputs: rows of the `T * (s / stride)**2` outputs; None for all of them.
        inputs: a row of the `T * s*s` inputs for each; None for all of them.
    """

    number: int
    outputs: Tensor | None
    inputs: Tensor | None


def _taps(
    neighbours: Tensor,
    side: int,
    kernel: Sequence[int],
    stride: int,
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Iterator[_Tap]:
    """The taps of a kernel; first the one through which every output sees itself, if there is."""
    own = None
    if stride == 1 and all(p in range(0, d * k, d) for k, p, d in zip(kernel, padding, dilation)):
        own = padding[0] // dilation[0] * kernel[1] + padding[1] // dilation[1]
        yield _Tap(own, None, None)
    rows = neighbours.shape[0] * side * side
    numbers = torch.arange(1.0, rows + 1, dtype=torch.float64, device=neighbours.device)
    halo = window_halo(kernel, stride, padding, dilation)
    windows = torch.ops.convmae.gather_windows(
        numbers.view(-1, side * side, 1), neighbours, halo, 0.0
    )
    met = patches_of_windows(windows, kernel, stride, dilation).flatten(0, 1).t().contiguous()
    numbers_of_taps, outputs = met.nonzero(as_tuple=True)  # in the order of the taps
    inputs = met[numbers_of_taps, outputs].long() - 1
    sizes = numbers_of_taps.bincount(minlength=len(met)).tolist()
    for number, pair in enumerate(zip(outputs.split(sizes), inputs.split(sizes))):
        if number != own:
            yield _Tap(number, *pair)


def _rows(x: Tensor, chosen: Tensor | None) -> Tensor:
    return x if chosen is None else x.index_select(0, chosen)


def _add(total: Tensor | None, rows: int, chosen: Tensor | None, part: Tensor) -> Tensor:
    """`total`, of so many rows, 0 if it is None, to whose `chosen` rows `part` was added."""
    if chosen is None:
        return part if total is None else total.add_(part)
    total = part.new_zeros(rows, part.shape[1]) if total is None else total
    return total.index_add_(0, chosen, part)


def _matrices(weight: Tensor) -> Tensor:
    """`[C_out, C_in, kh, kw] -> [kh * kw, C_out, C_in]`, each a matrix that can be multiplied."""
    matrices = weight.permute(2, 3, 0, 1).flatten(0, 1)
    return matrices if matrices.stride(2) == 1 else matrices.contiguous()


def _convolve(x, weight, bias, neighbours, stride, padding, dilation):
    side, matrices = block_side(x.shape[1]), _matrices(weight)
    inputs, outputs = x.flatten(0, 1), x.shape[0] * (side // stride) ** 2
    y = None if bias is None else bias.repeat(outputs, 1)
    for tap in _taps(neighbours, side, weight.shape[2:], stride, padding, dilation):
        part = _rows(inputs, tap.inputs) @ matrices[tap.number].t()
        y = _add(y, outputs, tap.outputs, part)
    return y.view(x.shape[0], (side // stride) ** 2, weight.shape[0])


def _input_grad(grad, weight, neighbours, stride, padding, dilation):
    side, matrices = block_side(grad.shape[1]) * stride, _matrices(weight)
    outputs, inputs = grad.flatten(0, 1), grad.shape[0] * side * side
    x = None
    for tap in _taps(neighbours, side, weight.shape[2:], stride, padding, dilation):
        part = _rows(outputs, tap.outputs) @ matrices[tap.number]
        x = _add(x, inputs, tap.inputs, part)
    return x.view(grad.shape[0], side * side, weight.shape[1])


def _weight_grad(grad, x, neighbours, kernel, stride, padding, dilation):
    side, outputs, inputs = block_side(x.shape[1]), grad.flatten(0, 1), x.flatten(0, 1)
    weight = grad.new_empty(grad.shape[2], kernel[0] * kernel[1], x.shape[2])
    for tap in _taps(neighbours, side, kernel, stride, padding, dilation):
        seen, seeing = _rows(inputs, tap.inputs), _rows(outputs, tap.outputs)
        torch.mm(seeing.t(), seen, out=weight[:, tap.number])
    return weight.unflatten(1, tuple(kernel)).permute(0, 3, 1, 2), outputs.sum(0)


def _fake(x, weight, bias, neighbours, stride, padding, dilation):
    side = block_side(x.shape[1]) // stride
    return x.new_empty(x.shape[0], side * side, weight.shape[0])


def _fake_input_grad(grad, weight, neighbours, stride, padding, dilation):
    side = block_side(grad.shape[1]) * stride
    return grad.new_empty(grad.shape[0], side * side, weight.shape[1])


def _fake_weight_grad(grad, x, neighbours, kernel, stride, padding, dilation):
    weight = grad.new_empty(grad.shape[2], *kernel, x.shape[2]).permute(0, 3, 1, 2)
    return weight, grad.new_empty(grad.shape[2])


_OF_CONVOLUTION, _OF_INPUT_GRAD, _OF_WEIGHT_GRAD = derivatives_of_convolution("tap_conv2d")
_SHAPE = "SymInt stride, SymInt[2] padding, SymInt[2] dilation"

register(
    f"tap_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor neighbours, {_SHAPE}) -> Tensor",
    None,
    _fake,
    _OF_CONVOLUTION,
    lambda ops: _convolve,
    flops=window_flops,
)
register(
    f"tap_conv2d_input_grad(Tensor grad, Tensor weight, Tensor neighbours, {_SHAPE}) -> Tensor",
    None,
    _fake_input_grad,
    _OF_INPUT_GRAD,
    lambda ops: _input_grad,
    flops=grouped_input_flops,
)
register(
    "tap_conv2d_weight_grad(Tensor grad, Tensor x, Tensor neighbours, SymInt[2] kernel,"
    f" {_SHAPE}) -> (Tensor, Tensor)",
    None,
    _fake_weight_grad,
    _OF_WEIGHT_GRAD,
    lambda ops: _weight_grad,
    flops=grouped_weight_flops,
)
