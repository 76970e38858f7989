"""Convolution of packed features with any channels, groups and stride.

The blocks' windows (`gather_windows`) are a batch of small images. Where few outputs lie in one,
a convolution becomes one matrix product with what every output looks at; where many do, PyTorch's
convolution is as fast and copies less. Neither is kept for the backward pass: it is made again.
On a CPU two kinds have ops of their own, which need no windows: groups of channels
(`grouped_conv2d`), and products of many channels (`tap_conv2d`). On a GPU `goes_without_windows`
says which have Triton's kernels in place of this op.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d, linear

from convmae_kernels.ops import grouped_conv2d, tap_conv2d  # noqa: F401  (registers the ops)
from convmae_kernels.ops.support import geometry
from convmae_kernels.ops.support.arithmetic import product_dtype
from convmae_kernels.ops.support.autocast import without_autocast
from convmae_kernels.ops.support.conv_plan import multiplies_windows
from convmae_kernels.ops.support.dispatch import WHY_NOT_COMPILED, WHY_NOT_TRITON, Impl, register
from convmae_kernels.ops.support.dtypes import HALF_DTYPES
from convmae_kernels.ops.support.flops import window_flops
from convmae_kernels.ops.support.windows import add_patches, patches_of_windows
from convmae_kernels.zorder import block_side, rows_from_zorder, rows_to_zorder

LEAST_CHANNELS_OF_TRITON = 16  # of inputs and outputs of a group: the sides of a tensor core


def _is_product(x: Tensor, stride: int, groups: int) -> bool:
    return multiplies_windows(block_side(x.shape[1]), stride, groups)


def _has_grouped_kernels(ops, x: Tensor, groups: int) -> bool:
    """Whether the kernels of `grouped_conv2d` are there: the compiled ones, for CPUs."""
    compiled = ops is torch.ops.convmae and WHY_NOT_COMPILED is None
    return groups > 1 and x.device.type == "cpu" and compiled


def goes_without_windows(impl: Impl, x: Tensor, weight: Tensor, groups: int) -> bool:
    """Whether Triton's kernels of `grouped_conv2d` take the place of `window_conv2d`.

    They multiply on tensor cores, so groups must have many channels. Those have no exact products
    of float32: PyTorch's products of windows are faster where a group has all the channels, and
    only who asks for Triton has its kernels there.

    Args:
        impl: as it was asked for; "auto" takes them on GPUs.
        x: packed features, in the dtype in which they are convolved.
        weight: `[C_out, C_in / groups, kh, kw]`.
        groups: of channels.
    """
    channels = min(weight.shape[1], weight.shape[0] // groups)
    if channels < LEAST_CHANNELS_OF_TRITON or x.dtype == torch.float64:
        return False
    if impl == "triton":
        return True
    on_gpu = x.device.type == "cuda" and WHY_NOT_TRITON is None
    return impl == "auto" and on_gpu and (groups > 1 or x.dtype in HALF_DTYPES)


def _goes_by_taps(ops, x: Tensor, weight: Tensor, stride: int, groups: int) -> bool:
    """Whether the ops of `tap_conv2d` compute it: on a CPU, which has no trouble with the numbers
    of what is visible, where channels are many; half types would be rounded after each tap."""
    cpu = x.device.type == "cpu" and ops is torch.ops.convmae
    wide = product_dtype(x).itemsize > 2 and min(weight.shape[:2]) >= tap_conv2d.LEAST_CHANNELS
    return cpu and wide and _is_product(x, stride, groups)


def _matrix(weight: Tensor) -> Tensor:
    """`[C_out, C_in, kh, kw] -> [C_out, kh * kw * C_in]`."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _fake(x, weight, bias, neighbours, stride, padding, dilation, groups):
    side = block_side(x.shape[1]) // stride
    return x.new_empty(x.shape[0], side * side, weight.shape[0])


def _composed(ops):
    def window_conv2d(x, weight, bias, neighbours, stride, padding, dilation, groups):
        if _has_grouped_kernels(ops, x, groups):
            return ops.grouped_conv2d(
                x, weight, bias, neighbours, stride, padding, dilation, groups
            )
        kernel, dtype = weight.shape[2:], product_dtype(x)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        if _goes_by_taps(ops, x, weight, stride, groups):
            shape = stride, padding, dilation
            with without_autocast(x):
                y = ops.tap_conv2d(x.to(dtype), weight, bias, neighbours, *shape)
            return y.to(x.dtype)
        halo = geometry.window_halo(kernel, stride, padding, dilation)
        windows = ops.gather_windows(x, neighbours, halo, 0.0).to(dtype)
        with without_autocast(x):
            if _is_product(x, stride, groups):
                patches = patches_of_windows(windows, kernel, stride, dilation)
                y = linear(patches, _matrix(weight), bias)
            else:
                windows = windows.permute(0, 3, 1, 2)
                y = conv2d(windows, weight, bias, stride, 0, dilation, groups)
                y = rows_to_zorder(y.permute(0, 2, 3, 1))
        return y.to(x.dtype)

    return window_conv2d


def _derivatives(ops):
    def setup_context(ctx, inputs, output):
        x, weight, bias, neighbours, ctx.stride, ctx.padding, ctx.dilation, ctx.groups = inputs
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, weight, neighbours)

    def backward(ctx, grad):
        x, weight, neighbours = ctx.saved_tensors
        if _has_grouped_kernels(ops, x, ctx.groups):
            grads = _grads_of_groups(ops, ctx, grad, x, weight, neighbours)
        elif _goes_by_taps(ops, x, weight, ctx.stride, ctx.groups):
            grads = _grads_of_taps(ops, ctx, grad, x, weight, neighbours)
        elif _is_product(x, ctx.stride, ctx.groups):
            grads = _grads_of_product(ops, ctx, grad, x, weight, neighbours)
        else:
            grads = _grads_of_convolution(ops, ctx, grad, x, weight, neighbours)
        return *grads, None, None, None, None, None

    return backward, setup_context


def _grads_of_product(ops, ctx, grad, x, weight, neighbours):
    kernel, dtype = weight.shape[2:], product_dtype(x)
    halo = geometry.window_halo(kernel, ctx.stride, ctx.padding, ctx.dilation)
    wide = grad.to(dtype)
    grad_x = grad_weight = grad_bias = None
    with without_autocast(x):
        if ctx.needs_input_grad[1]:
            windows = ops.gather_windows(x, neighbours, halo, 0.0).to(dtype)
            patches = patches_of_windows(windows, kernel, ctx.stride, ctx.dilation)
            grad_weight = wide.flatten(0, 1).t() @ patches.flatten(0, 1)
            grad_weight = grad_weight.view(-1, *kernel, x.shape[2]).permute(0, 3, 1, 2)
            grad_weight = grad_weight.to(weight.dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = wide.sum((0, 1)).to(weight.dtype)
        if ctx.needs_input_grad[0] and ctx.stride == 1:
            turned = weight.flip(2, 3).transpose(0, 1)
            padding = [d * (k - 1) - p for k, p, d in zip(kernel, ctx.padding, ctx.dilation)]
            grad_x = ops.window_conv2d(grad, turned, None, neighbours, 1, padding, ctx.dilation, 1)
        elif ctx.needs_input_grad[0]:
            side = block_side(x.shape[1])
            rows, columns = halo[0] + side + halo[1], halo[2] + side + halo[3]
            patches = wide @ _matrix(weight).to(dtype)
            windows = add_patches(patches, kernel, ctx.stride, ctx.dilation, rows, columns)
            grad_x = ops.gather_windows_grad(windows.to(x.dtype), neighbours, halo)
    return grad_x, grad_weight, grad_bias


def _grads_of_taps(ops, ctx, grad, x, weight, neighbours):
    shape, dtype = (ctx.stride, ctx.padding, ctx.dilation), product_dtype(x)
    wide = grad.to(dtype)
    grad_x = grad_weight = grad_bias = None
    with without_autocast(x):
        if ctx.needs_input_grad[0]:
            grad_x = ops.tap_conv2d_input_grad(wide, weight.to(dtype), neighbours, *shape)
            grad_x = grad_x.to(x.dtype)
        if ctx.needs_input_grad[1] or (ctx.has_bias and ctx.needs_input_grad[2]):
            grad_weight, grad_bias = ops.tap_conv2d_weight_grad(
                wide, x.to(dtype), neighbours, weight.shape[2:], *shape
            )
            grad_weight, grad_bias = grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)
    return grad_x, grad_weight, grad_bias if ctx.has_bias else None


def _grads_of_groups(ops, ctx, grad, x, weight, neighbours):
    shape = (ctx.stride, ctx.padding, ctx.dilation, ctx.groups)
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = ops.grouped_conv2d_input_grad(grad, weight, neighbours, *shape)
    if ctx.needs_input_grad[1] or (ctx.has_bias and ctx.needs_input_grad[2]):
        grad_weight, grad_bias = ops.grouped_conv2d_weight_grad(
            grad, x, neighbours, weight.shape[2:], *shape
        )
    return grad_x, grad_weight, grad_bias if ctx.has_bias else None


def _grads_of_convolution(ops, ctx, grad, x, weight, neighbours):
    dtype = product_dtype(x)
    halo = geometry.window_halo(weight.shape[2:], ctx.stride, ctx.padding, ctx.dilation)
    windows = ops.gather_windows(x, neighbours, halo, 0.0).to(dtype).permute(0, 3, 1, 2)
    tiles = rows_from_zorder(grad.to(dtype)).permute(0, 3, 1, 2)
    wanted = [*ctx.needs_input_grad[:2], ctx.has_bias and ctx.needs_input_grad[2]]
    grad_windows, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        tiles,
        windows,
        weight.to(dtype),
        [weight.shape[0]] if ctx.has_bias else None,
        [ctx.stride] * 2,
        [0, 0],
        ctx.dilation,
        False,
        [0, 0],
        ctx.groups,
        wanted,
    )
    grad_x = None
    if wanted[0]:
        grad_windows = grad_windows.permute(0, 2, 3, 1).to(x.dtype)
        grad_x = ops.gather_windows_grad(grad_windows, neighbours, halo)
    rounded = (None if g is None else g.to(weight.dtype) for g in (grad_weight, grad_bias))
    return grad_x, *rounded


register(
    "window_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor neighbours, SymInt stride,"
    " SymInt[2] padding, SymInt[2] dilation, SymInt groups) -> Tensor",
    None,
    _fake,
    _derivatives,
    _composed,
    flops=window_flops,
)
