"""Depthwise convolution of packed features that computes only the outputs which a stride keeps.

Even kernels and kernels off their centre are its too. Features are read where they lie, and no
hidden block is. What is centred and without a stride is `masked_conv2d`'s.
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


def _fake(x, weight, bias, neighbours, stride, padding, dilation):
    side = block_side(x.shape[1]) // stride
    return x.new_empty(x.shape[0], side * side, x.shape[2])


def _fake_input_grad(grad, weight, neighbours, stride, padding, dilation):
    side = block_side(grad.shape[1]) * stride
    return grad.new_empty(grad.shape[0], side * side, grad.shape[2])


def _fake_weight_grad(grad, x, neighbours, kernel, stride, padding, dilation):
    return x.new_empty(x.shape[2], 1, *kernel), x.new_empty(x.shape[2])


_OF_CONVOLUTION, _OF_INPUT_GRAD, _OF_WEIGHT_GRAD = derivatives_of_convolution("strided_conv2d")
_SHAPE = "SymInt stride, SymInt[2] padding, SymInt[2] dilation"

register(
    f"strided_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor neighbours, {_SHAPE}) -> Tensor",
    reference.strided_conv2d,
    _fake,
    _OF_CONVOLUTION,
    flops=window_flops,
)
register(
    f"strided_conv2d_input_grad(Tensor grad, Tensor weight, Tensor neighbours, {_SHAPE}) -> Tensor",
    reference.strided_conv2d_input_grad,
    _fake_input_grad,
    _OF_INPUT_GRAD,
    flops=grouped_input_flops,
)
register(
    "strided_conv2d_weight_grad(Tensor grad, Tensor x, Tensor neighbours, SymInt[2] kernel,"
    f" {_SHAPE}) -> (Tensor, Tensor)",
    reference.strided_conv2d_weight_grad,
    _fake_weight_grad,
    _OF_WEIGHT_GRAD,
    flops=grouped_weight_flops,
)
