"""Convolution of packed features that looks across block borders and sees visible blocks only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from convmae_kernels.ops import reference
from convmae_kernels.ops.checks import check_packed
from convmae_kernels.ops.library import (
    Impl,
    autocast_dtype,
    autocast_is_on,
    register,
    select,
)

if TYPE_CHECKING:
    from convmae_kernels.block_mask import BlockMask

MAX_KERNEL = 15


def _fake(x, weight, bias, neighbours, dilation):
    return x.new_empty(x.shape)


def _fake_weight_grad(grad, x, neighbours, kernel, dilation):
    return x.new_empty(x.shape[2], 1, *kernel), x.new_empty(x.shape[2])


# The ops are closed under differentiation. With w the weight, g a gradient and ~ a flip of both
# axes: conv(x, w) has the gradients conv(g, ~w) and weight_grad(g, x); and weight_grad(g, x), given
# the gradients (u, v) of its two outputs, has conv(x, u, v) in g and conv(g, ~u) in x.


def _derivatives(ops):
    def setup_context(ctx, inputs, output):
        x, weight, bias, neighbours, ctx.dilation = inputs
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, weight, neighbours)

    def backward(ctx, grad):
        x, weight, neighbours = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = ops.masked_conv2d(grad, weight.flip(2, 3), None, neighbours, ctx.dilation)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_weight, grad_bias = ops.masked_conv2d_weight_grad(
                grad, x, neighbours, weight.shape[2:], ctx.dilation
            )
        return grad_x, grad_weight, grad_bias if ctx.has_bias else None, None, None

    return backward, setup_context


def _derivatives_weight_grad(ops):
    def setup_context(ctx, inputs, output):
        grad, x, neighbours, _, ctx.dilation = inputs
        ctx.save_for_backward(grad, x, neighbours)

    def backward(ctx, grad_weight, grad_bias):
        grad, x, neighbours = ctx.saved_tensors
        grad_grad = grad_x = None
        if ctx.needs_input_grad[0]:
            grad_grad = ops.masked_conv2d(x, grad_weight, grad_bias, neighbours, ctx.dilation)
        if ctx.needs_input_grad[1]:
            grad_x = ops.masked_conv2d(grad, grad_weight.flip(2, 3), None, neighbours, ctx.dilation)
        return grad_grad, grad_x, None, None, None

    return backward, setup_context


register(
    "masked_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor neighbours, SymInt[2] dilation)"
    " -> Tensor",
    reference.masked_conv2d,
    _fake,
    _derivatives,
)
register(
    "masked_conv2d_weight_grad(Tensor grad, Tensor x, Tensor neighbours, SymInt[2] kernel,"
    " SymInt[2] dilation) -> (Tensor, Tensor)",
    reference.masked_conv2d_weight_grad,
    _fake_weight_grad,
    _derivatives_weight_grad,
)


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: BlockMask,
    stride: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """`gather(conv2d(scatter(x), weight, bias, padding="same"))`, only at visible positions.

    At each visible position `p`: `y[p] = bias + sum of weight[d] * x[p + d]` over the taps `d` for
    which `p + d` is visible. Hidden positions and positions outside the image count as zero.

    Args:
        x: packed features `[T, s*s, C]`, float32, bfloat16, float16 or float64.
        weight: `[C_out, C_in / groups, kh, kw]` as in `torch.nn.functional.conv2d`, in the dtype of
            `x`, `kh` and `kw` odd and at most 15. This version has the depthwise convolution:
            `groups == C_in == C_out`.
        bias: `[C_out]` or None.
        mask: the mask that `x` was packed with.
        stride: 1 in this version.
        dilation: distance between the taps, at least 1.
        groups: as in `torch.nn.functional.conv2d`.
        impl: which implementation runs; "auto" is the fastest that is there.

    Returns:
        `[T, s*s, C_out]` in the dtype of `x`; sums are accumulated in float32 (float64 for
        float64). Differentiable any number of times; the same input gives the same bits whatever
        the number of threads. Under autocast it runs in the autocast dtype.

    Raises:
        TypeError: an argument is not a tensor of one of the dtypes, or dtypes differ.
        ValueError: shapes, devices, kernel size or dilation do not fit.
        NotImplementedError: `stride` is not 1, or the convolution is not depthwise.
        RuntimeError: `impl` was named and cannot run.
    """
    side = check_packed("x", x, mask)
    dilation = _pair("dilation", dilation)
    _check_weight(x, weight, bias, groups)
    if _pair("stride", stride) != (1, 1):
        raise NotImplementedError(f"masked_conv2d has stride 1 only in this version, got {stride}")
    halo = max(d * (k // 2) for d, k in zip(dilation, weight.shape[2:]))
    neighbours = mask.neighbours(-(-halo // side))
    dtype = autocast_dtype(x)
    x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    run = select(impl, "masked_conv2d", reference.masked_conv2d, x)
    return run(x, weight, bias, neighbours, dilation)


def _pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{name} must be a positive integer or a pair of them, got {value!r}")
    return pair


def _check_weight(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    channels = x.shape[2]
    for name, tensor in (("weight", weight), ("bias", bias)):
        if name == "bias" and tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype != x.dtype and not autocast_is_on(x.device.type):
            raise TypeError(f"{name} is {tensor.dtype}, but x is {x.dtype}; they must be the same")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, but x is on {x.device}")
    if weight.dim() != 4:
        raise ValueError(f"weight must be [C_out, C_in / groups, kh, kw], got {list(weight.shape)}")
    out_channels, in_channels, kh, kw = weight.shape
    if in_channels * groups != channels:
        raise ValueError(
            f"x has {channels} channels, but weight {list(weight.shape)} with groups={groups} "
            f"takes {in_channels * groups}"
        )
    if not groups == channels == out_channels:
        raise NotImplementedError(
            "masked_conv2d is depthwise only in this version (groups == C_in == C_out), got "
            f"groups={groups}, C_in={channels}, C_out={out_channels}"
        )
    if kh % 2 == 0 or kw % 2 == 0 or max(kh, kw) > MAX_KERNEL:
        raise ValueError(f"kernel sides must be odd and at most {MAX_KERNEL}, got {kh} x {kw}")
    if bias is not None and bias.shape != (out_channels,):
        raise ValueError(f"bias must be [{out_channels}], got {list(bias.shape)}")
