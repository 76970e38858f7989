"""Convolution of packed features in groups of channels, and its two gradients: kernels for CPUs.

PyTorch's convolution of many small windows is slow where a group has few channels. These kernels
read packed features where they lie, and no hidden block. `window_conv2d` is made of them on a CPU.
"""

from __future__ import annotations

from convmae_kernels.ops import reference
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


# The ops are closed under differentiation, being linear in each of their tensors. With w the
# weight, b the bias and g a gradient of the output: conv(x, w, b) has the gradients
# input_grad(g, w) and weight_grad(g, x); input_grad(g, w), given a gradient u, has conv(u, w) in g
# and weight_grad(g, u) in w; weight_grad(g, x), given the gradients (v, c) of its two outputs, has
# conv(x, v, c) in g and input_grad(g, v) in x.


def _save_shape(ctx, weight_shape, stride, padding, dilation, groups):
    ctx.kernel = weight_shape[-2:]
    ctx.shape = (stride, padding, dilation, groups)


def _derivatives(ops):
    def setup_context(ctx, inputs, output):
        x, weight, bias, neighbours, *shape = inputs
        _save_shape(ctx, weight.shape, *shape)
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, weight, neighbours)

    def backward(ctx, grad):
        x, weight, neighbours = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = ops.grouped_conv2d_input_grad(grad, weight, neighbours, *ctx.shape)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_weight, grad_bias = ops.grouped_conv2d_weight_grad(
                grad, x, neighbours, ctx.kernel, *ctx.shape
            )
        grad_bias = grad_bias if ctx.has_bias else None
        return grad_x, grad_weight, grad_bias, None, None, None, None, None

    return backward, setup_context


def _derivatives_input_grad(ops):
    def setup_context(ctx, inputs, output):
        grad, weight, neighbours, *shape = inputs
        _save_shape(ctx, weight.shape, *shape)
        ctx.save_for_backward(grad, weight, neighbours)

    def backward(ctx, grad_x):
        grad, weight, neighbours = ctx.saved_tensors
        grad_grad = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_grad = ops.grouped_conv2d(grad_x, weight, None, neighbours, *ctx.shape)
        if ctx.needs_input_grad[1]:
            grad_weight, _ = ops.grouped_conv2d_weight_grad(
                grad, grad_x, neighbours, ctx.kernel, *ctx.shape
            )
        return grad_grad, grad_weight, None, None, None, None, None

    return backward, setup_context


def _derivatives_weight_grad(ops):
    def setup_context(ctx, inputs, output):
        grad, x, neighbours, kernel, *shape = inputs
        _save_shape(ctx, kernel, *shape)
        ctx.save_for_backward(grad, x, neighbours)

    def backward(ctx, grad_weight, grad_bias):
        grad, x, neighbours = ctx.saved_tensors
        grad_grad = grad_x = None
        if ctx.needs_input_grad[0]:
            grad_grad = ops.grouped_conv2d(x, grad_weight, grad_bias, neighbours, *ctx.shape)
        if ctx.needs_input_grad[1]:
            grad_x = ops.grouped_conv2d_input_grad(grad, grad_weight, neighbours, *ctx.shape)
        return grad_grad, grad_x, None, None, None, None, None, None

    return backward, setup_context


_SHAPE = "SymInt stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups"

register(
    f"grouped_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor neighbours, {_SHAPE}) -> Tensor",
    None,
    _fake,
    _derivatives,
    lambda ops: reference.window_conv2d,
    flops=window_flops,
)
register(
    f"grouped_conv2d_input_grad(Tensor grad, Tensor weight, Tensor neighbours, {_SHAPE}) -> Tensor",
    None,
    _fake_input_grad,
    _derivatives_input_grad,
    lambda ops: reference.grouped_conv2d_input_grad,
    flops=grouped_input_flops,
)
register(
    "grouped_conv2d_weight_grad(Tensor grad, Tensor x, Tensor neighbours, SymInt[2] kernel,"
    f" {_SHAPE}) -> (Tensor, Tensor)",
    None,
    _fake_weight_grad,
    _derivatives_weight_grad,
    lambda ops: reference.grouped_conv2d_weight_grad,
    flops=grouped_weight_flops,
)
