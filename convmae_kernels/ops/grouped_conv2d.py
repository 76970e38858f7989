"""Convolution of packed features in groups of channels, and its two gradients.

These kernels read packed features where they lie, and no hidden block; no window is copied. On a
CPU they are for groups of few channels, of which PyTorch's convolution of many small windows is
slow: `window_conv2d` is made of them there. On a GPU they are Triton's, products on tensor cores:
`masked_conv2d` takes them for groups of many channels, and without groups.
"""

from __future__ import annotations

from convmae_kernels.ops import reference
from convmae_kernels.ops.support.derivatives import derivatives_of_convolution
from convmae_kernels.ops.support.dispatch import register
from convmae_kernels.ops.support.flops import (
    grouped_input_flops,
    grouped_weight_flops,
    window_flops,
)
from convmae_kernels.zorder import block_side


def _fake(x, weight, bias, neighbours, stride, padding, dilation, groups):
    side = block_side(x.shape[1]) // stride
    return x.new_empty(x.shape[0], side * side, weight.shape[0])


def _fake_input_grad(grad, weight, neighbours, stride, padding, dilation, groups):
    side = block_side(grad.shape[1]) * stride
    return grad.new_empty(grad.shape[0], side * side, weight.shape[1] * groups)


def _fake_weight_grad(grad, x, neighbours, kernel, stride, padding, dilation, groups):
    outputs = grad.shape[2]
    return grad.new_empty(outputs, x.shape[2] // groups, *kernel), grad.new_empty(outputs)


_OF_CONVOLUTION, _OF_INPUT_GRAD, _OF_WEIGHT_GRAD = derivatives_of_convolution("grouped_conv2d")
_SHAPE = "SymInt stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups"

register(
    f"grouped_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor neighbours, {_SHAPE}) -> Tensor",
    reference.window_conv2d,
    _fake,
    _OF_CONVOLUTION,
    flops=window_flops,
)
register(
    f"grouped_conv2d_input_grad(Tensor grad, Tensor weight, Tensor neighbours, {_SHAPE}) -> Tensor",
    reference.grouped_conv2d_input_grad,
    _fake_input_grad,
    _OF_INPUT_GRAD,
    flops=grouped_input_flops,
)
register(
    "grouped_conv2d_weight_grad(Tensor grad, Tensor x, Tensor neighbours, SymInt[2] kernel,"
    f" {_SHAPE}) -> (Tensor, Tensor)",
    reference.grouped_conv2d_weight_grad,
    _fake_weight_grad,
    _OF_WEIGHT_GRAD,
    flops=grouped_weight_flops,
)
