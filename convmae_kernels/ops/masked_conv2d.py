"""Convolution of packed features that looks across block borders and sees visible blocks only."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from convmae_kernels.ops import (  # noqa: F401  (registers the ops)
    reference,
    strided_conv2d,
)
from convmae_kernels.ops.support.arithmetic import as_cast, multiply, patch_conv2d
from convmae_kernels.ops.support.autocast import autocast_dtype, autocast_is_on
from convmae_kernels.ops.support.checks import check_packed
from convmae_kernels.ops.support.choices import Sizes
from convmae_kernels.ops.support.conv_plan import ConvPlan, plan_conv2d
from convmae_kernels.ops.support.dispatch import (
    Impl,
    as_measured,
    check_impl,
    register,
    select,
)
from convmae_kernels.ops.support.flops import (
    both_gradients_flops,
    depthwise_flops,
    weight_gradient_flops,
)
from convmae_kernels.ops.support.geometry import pair
from convmae_kernels.ops.window_conv2d import goes_without_windows
from convmae_kernels.zorder import BLOCK_SIZES, to_zorder

if TYPE_CHECKING:
    from convmae_kernels.block_mask import BlockMask


def _fake(x, weight, bias, neighbours, dilation):
    return x.new_empty(x.shape)


def _fake_weight_grad(grad, x, neighbours, kernel, dilation):
    return x.new_empty(x.shape[2], 1, *kernel), x.new_empty(x.shape[2])


def _fake_grads(grad, x, weight, neighbours, dilation):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), x.new_empty(x.shape[2])


# The ops are closed under differentiation. With w the weight, g a gradient and ~ a flip of both
# axes: conv(x, w) has the gradients conv(g, ~w) and weight_grad(g, x); and weight_grad(g, x), given
# the gradients (u, v) of its two outputs, has conv(x, u, v) in g and conv(g, ~u) in x.
# grads(g, x, w) is both at once, conv(g, ~w) and weight_grad(g, x). Given the gradients (t, u, v)
# of its three outputs, it has conv(t, w) + conv(x, u, v) in g, conv(g, ~u) in x and
# weight_grad(g, t) in w.


def _derivatives(ops):
    def setup_context(ctx, inputs, output):
        x, weight, bias, neighbours, ctx.dilation = inputs
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, weight, neighbours)

    def backward(ctx, grad):
        x, weight, neighbours = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0] and ctx.needs_input_grad[1]:
            grad_x, grad_weight, grad_bias = ops.masked_conv2d_grads(
                grad, x, weight, neighbours, ctx.dilation
            )
        elif ctx.needs_input_grad[0]:
            grad_x = ops.masked_conv2d(grad, weight.flip(2, 3), None, neighbours, ctx.dilation)
        if grad_weight is None and any(ctx.needs_input_grad[1:3]):
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


def _derivatives_grads(ops):
    def setup_context(ctx, inputs, output):
        grad, x, weight, neighbours, ctx.dilation = inputs
        ctx.save_for_backward(grad, x, weight, neighbours)
        # Of three outputs often one is differentiated: zeros for the others would cost as much.
        ctx.set_materialize_grads(False)

    def backward(ctx, grad_of_x, grad_of_weight, grad_of_bias):
        grad, x, weight, neighbours = ctx.saved_tensors
        grad_grad = grad_x = grad_weight = None
        if grad_of_x is not None:
            if ctx.needs_input_grad[0]:
                grad_grad = ops.masked_conv2d(grad_of_x, weight, None, neighbours, ctx.dilation)
            if ctx.needs_input_grad[2]:
                grad_weight, _ = ops.masked_conv2d_weight_grad(
                    grad, grad_of_x, neighbours, weight.shape[2:], ctx.dilation
                )
        if grad_of_weight is None and grad_of_bias is not None:
            grad_of_weight = torch.zeros_like(weight)
        if grad_of_weight is not None:
            if ctx.needs_input_grad[0]:
                more = ops.masked_conv2d(x, grad_of_weight, grad_of_bias, neighbours, ctx.dilation)
                grad_grad = more if grad_grad is None else grad_grad + more
            if ctx.needs_input_grad[1]:
                flipped = grad_of_weight.flip(2, 3)
                grad_x = ops.masked_conv2d(grad, flipped, None, neighbours, ctx.dilation)
        return grad_grad, grad_x, grad_weight, None, None

    return backward, setup_context


register(
    "masked_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor neighbours, SymInt[2] dilation)"
    " -> Tensor",
    reference.masked_conv2d,
    _fake,
    _derivatives,
    flops=depthwise_flops,
)
register(
    "masked_conv2d_weight_grad(Tensor grad, Tensor x, Tensor neighbours, SymInt[2] kernel,"
    " SymInt[2] dilation) -> (Tensor, Tensor)",
    reference.masked_conv2d_weight_grad,
    _fake_weight_grad,
    _derivatives_weight_grad,
    flops=weight_gradient_flops,
)
register(
    "masked_conv2d_grads(Tensor grad, Tensor x, Tensor weight, Tensor neighbours,"
    " SymInt[2] dilation) -> (Tensor, Tensor, Tensor)",
    reference.masked_conv2d_grads,
    _fake_grads,
    _derivatives_grads,
    flops=both_gradients_flops,
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
    padding: str | int | tuple = "same",
    impl: Impl = "auto",
) -> Tensor:
    """`gather(conv2d(scatter(x), weight, bias, stride, padding))`, only at visible positions.

    At each visible position `p`: `y[p] = bias + sum of weight[d] * x[stride * p + d]` over the taps
    `d` whose position is visible. Hidden positions and positions outside the image count as zero.

    Args:
        x: packed features `[T, s*s, C_in]`, float32, bfloat16, float16 or float64.
        weight: `[C_out, C_in / groups, kh, kw]` as in `torch.nn.functional.conv2d`, in the dtype of
            `x`.
        bias: `[C_out]` or None.
        mask: the mask that `x` was packed with.
        stride: a power of two up to `s`, the same in both directions.
        dilation: distance between the taps, at least 1.
        groups: as in `torch.nn.functional.conv2d`.
        padding: "same", which is `dilation * (k - 1) // 2`, or 0 where the taps reach no farther
            than the stride, as in patch embeddings; "valid", which is 0; or a number, a pair of
            numbers, or `((top, bottom), (left, right))`, of positions with which a map's side
            shrinks by `stride`, no more and no less: patch embeddings, whose kernel is their
            stride, have 0. Of four numbers some may be negative: positions that are left out.
        impl: which implementation runs; "auto" is the fastest that is there, "reference" always
            applies. The other names choose kernels of this package: for depthwise convolutions with
            a kernel up to 15, for groups on a CPU, and of Triton's for 16 channels of a group or
            more, those that convolve, for others those that gather the windows, which PyTorch then
            multiplies or convolves. "auto" takes those of Triton on a GPU, for half types and for
            groups. A convolution without groups whose kernel is its stride, or 1 x 1, is a matrix
            product of packed features: there are no kernels to choose from, and these names are
            refused.

    Returns:
        `[T, (s / stride) ** 2, C_out]` in the dtype of `x`, for the same mask. Differentiable any
        number of times. Half types are accumulated in float32. Under autocast it runs in the
        autocast dtype. Of depthwise convolutions with a kernel up to 15, of groups on a CPU, and
        of Triton's kernels, the same input gives the same bits whatever the number of threads;
        others are PyTorch's matrix products and convolutions of what `gather_windows` gives, and as
        repeatable as these.

    Raises:
        TypeError: an argument is not a tensor of one of the dtypes, or dtypes differ.
        ValueError: shapes, devices, kernel size, groups, stride, padding or dilation do not fit.
        RuntimeError: `impl` was named, and cannot run or does not apply.
    """
    side = check_packed("x", x, mask)
    _check_weight(x, weight, bias, groups)
    plan = plan_conv2d(side, weight.shape, stride, padding, dilation, groups)
    if not plan.has_kernels:
        check_impl(impl, x)
        check_has_kernels(impl, weight, plan)
    if plan.sampled > 1:
        x = x[:, :: plan.sampled]
    if not plan.has_kernels and impl == "auto":
        return patch_conv2d(x, weight, bias)
    dtype = autocast_dtype(x)
    weight, bias = as_cast(weight), None if bias is None else as_cast(bias)
    x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    neighbours = mask.neighbours(plan.radius)
    # In a program of plain ops the other way is one convolution, and this one a sum over taps.
    plain = impl == "auto" and mask.wants_plain_ops()
    op = {"depthwise": "masked_conv2d", "strided": "strided_conv2d"}.get(plan.way, "window_conv2d")
    if max(plan.dilation) == 1:
        _, group_channels, *kernel = weight.shape
        sizes = Sizes(side, x.shape[2], (kernel[0], kernel[1]), plan.stride, group_channels)
        impl = as_measured(impl, op, x, sizes)
    if plan.way == "depthwise" and not plain:
        run = select(impl, op, reference.masked_conv2d, x, mask)
        return run(x, weight, bias, neighbours, plan.dilation)
    if plan.way == "strided" and not plain:
        run = select(impl, op, reference.strided_conv2d, x, mask)
        return run(x, weight, bias, neighbours, plan.stride, plan.padding, plan.dilation)
    without_windows = goes_without_windows(impl, x, weight, groups)
    name = "grouped_conv2d" if without_windows else "window_conv2d"
    run = select(impl, name, reference.window_conv2d, x, mask)
    return run(x, weight, bias, neighbours, plan.stride, plan.padding, plan.dilation, groups)


def check_has_kernels(impl: Impl, weight: Tensor, plan: ConvPlan) -> None:
    """No kernels were asked for by name where none of this package take part.

    Raises:
        RuntimeError: some were.
    """
    if plan.has_kernels or impl in ("auto", "reference"):
        return
    kernel, stride = tuple(weight.shape[2:]), math.isqrt(plan.sampled) * plan.stride
    raise RuntimeError(
        f"impl={impl!r} cannot run: with kernel {kernel}, stride {stride}, padding {plan.padding} "
        f"and groups={plan.groups} the convolution is {plan.description}; expected impl='auto' or "
        "'reference'"
    )


def masked_conv_transpose2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: BlockMask,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    output_padding: int | tuple[int, int] = 0,
    groups: int = 1,
    dilation: int | tuple[int, int] = 1,
) -> Tensor:
    """`gather(conv_transpose2d(scatter(x), weight, bias, stride, ...))`, at visible positions only.

    Where the kernel is the stride it is one matrix product. Otherwise the outputs whose row and
    column leave the same rest when divided by the stride are a convolution of `x` with every
    `stride`-th tap: `stride * stride` convolutions, which together do what one would.

    Args:
        x: packed features `[T, s*s, C_in]`, float32, bfloat16, float16 or float64.
        weight: `[C_in, C_out / groups, kh, kw]` in the dtype of `x`.
        bias: `[C_out]` or None.
        mask: the mask that `x` was packed with.
        stride: a power of two, the same in both directions; `s * stride` is at most 32.
        padding, output_padding, groups, dilation: as in `torch.nn.functional.conv_transpose2d`; the
            map's side must grow by `stride` exactly, so that `2 * padding - output_padding` is
            `dilation * (k - 1) + 1 - stride`.

    Returns:
        `[T, (s * stride) ** 2, C_out]` in the dtype of `x`, or autocast's, for the same mask.
        Differentiable any number of times.

    Raises:
        TypeError: an argument is not a tensor of one of the dtypes, or dtypes differ.
        ValueError: shapes, devices or stride do not fit, or the sizes do not keep the grid.
    """
    side = check_packed("x", x, mask)
    check_parameters(x, weight, bias)
    step, margin, steps = _check_transposed(
        side, x, weight, bias, stride, padding, output_padding, groups, dilation
    )
    kernel = tuple(weight.shape[2:])
    if kernel == (step, step) and groups == 1 and margin == (0, 0) and steps == (1, 1):
        return _transposed_product(x, weight, bias, step)
    # [C_out, C_in / groups, kh, kw], as a convolution has it
    weight = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    rows, columns = (_phases(*sizes, step) for sizes in zip(kernel, margin, steps))
    parts = []
    for row in rows:
        for column in columns:
            if row is None or column is None:  # no tap reaches these outputs
                part = x.new_zeros(x.shape[0], x.shape[1], weight.shape[0])
                part = part.to(autocast_dtype(x))
                parts.append(part if bias is None else part + as_cast(bias).to(part.dtype))
                continue
            taps = weight[:, :, row.first :: row.every][:, :, :, column.first :: column.every]
            taps = pad(taps.flip(2, 3), (*column.zeros, *row.zeros))
            margins = (row.before, row.after), (column.before, column.after)
            spacing = row.spacing, column.spacing
            parts.append(masked_conv2d(x, taps, bias, mask, 1, spacing, groups, padding=margins))
    outputs = torch.stack(parts, dim=2).unflatten(2, (step, step))  # [T, s*s, step, step, C_out]
    return to_zorder(outputs.permute(0, 1, 4, 2, 3)).transpose(2, 3).flatten(1, 2)


class _Phase(NamedTuple):
    """The taps that reach every `stride`-th output: `first`, `first + every`, ...

    In the reverse order, with as many `zeros` before and behind them as it takes to reach the
    output's own position, they are a kernel whose taps lie `spacing` apart. It reaches `before`
    positions before that position and `after` behind it.
    """

    first: int
    every: int
    zeros: tuple[int, int]
    spacing: int
    before: int
    after: int


def _phases(kernel: int, padding: int, dilation: int, stride: int) -> list[_Phase | None]:
    """For the outputs 0, ..., stride - 1 of each `stride`, the taps that reach them, if any do.

    Tap `d` of a position `i` adds to the output `stride * i + dilation * d - padding`.
    """
    phases: list[_Phase | None] = []
    for phase in range(stride):
        taps = [d for d in range(kernel) if (phase + padding - dilation * d) % stride == 0]
        if not taps:
            phases.append(None)
            continue
        met = [(phase + padding - dilation * d) // stride for d in taps]
        every, spacing = (taps[1] - taps[0], met[0] - met[1]) if len(taps) > 1 else (kernel, 1)
        zeros = max(0, -(-met[-1] // spacing)), max(0, -(met[0] // spacing))
        before, after = spacing * zeros[0] - met[-1], spacing * zeros[1] + met[0]
        phases.append(_Phase(taps[0], every, zeros, spacing, before, after))
    return phases


def _check_transposed(side, x, weight, bias, stride, padding, output_padding, groups, dilation):
    """The stride as a number, padding and dilation as pairs.

    Raises:
        ValueError: they do not fit, or do not keep the grid.
    """
    rows, columns = pair("stride", stride)
    if rows != columns or rows * side not in BLOCK_SIZES:
        raise ValueError(
            f"stride must be a power of two, the same in both directions, with which blocks of "
            f"side {side} have a side of at most {BLOCK_SIZES[-1]}, got {stride}"
        )
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups must be a positive integer, got {groups!r}")
    if weight.dim() != 4 or weight.shape[0] != x.shape[2] or weight.shape[0] % groups:
        raise ValueError(
            f"weight must be [C_in, C_out / groups, kh, kw] with C_in={x.shape[2]}, which "
            f"groups={groups} divides, got {list(weight.shape)}"
        )
    out_channels = weight.shape[1] * groups
    if bias is not None and bias.shape != (out_channels,):
        raise ValueError(f"bias must be [{out_channels}], got {list(bias.shape)}")
    padding, dilation = pair("padding", padding, least=0), pair("dilation", dilation)
    more = pair("output_padding", output_padding, least=0)
    for k, p, d, extra in zip(weight.shape[2:], padding, dilation, more):
        if d * (k - 1) + 1 - rows != 2 * p - extra:
            raise ValueError(
                f"padding must keep the grid of blocks: with kernel {tuple(weight.shape[2:])}, "
                f"stride {rows} and dilation {dilation}, 2 * padding - output_padding must be "
                f"{d * (k - 1) + 1 - rows}, got padding={padding} and output_padding={more}"
            )
    return rows, padding, dilation


def _transposed_product(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """Of a kernel that is its stride: every position makes `stride * stride` outputs alone."""
    out_channels = weight.shape[1]
    weight, bias = as_cast(weight), None if bias is None else as_cast(bias)
    matrix = to_zorder(weight).permute(2, 1, 0).flatten(0, 1)  # [stride**2 * C_out, C_in]
    outputs = x.shape[1] * stride * stride

    def product(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None or autocast_dtype(x).itemsize > 2:
            y = linear(x, matrix, None if bias is None else bias.repeat(stride * stride))
            return y.reshape(x.shape[0], outputs, out_channels)
        # A repeated bias would have a gradient of sums that are each rounded to the half type.
        return linear(x, matrix).reshape(x.shape[0], outputs, out_channels) + bias.to(
            autocast_dtype(x)
        )

    return multiply(product, x, matrix, bias)


# -- arguments ------------------------------------------------------------------------------------


def check_parameters(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """`weight` and `bias` are tensors of the dtype and on the device of `x`.

    Raises:
        TypeError, ValueError: they are not.
    """
    for name, tensor in (("weight", weight), ("bias", bias)):
        if name == "bias" and tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype != x.dtype and not autocast_is_on(x.device.type):
            raise TypeError(f"{name} is {tensor.dtype}, but x is {x.dtype}; they must be the same")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, but x is on {x.device}")


def _check_weight(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    channels = x.shape[2]
    check_parameters(x, weight, bias)
    if weight.dim() != 4 or 0 in weight.shape[2:]:
        raise ValueError(
            f"weight must be [C_out, C_in / groups, kh, kw] with a kernel of at least 1 x 1, got "
            f"{list(weight.shape)}"
        )
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups must be a positive integer, got {groups!r}")
    out_channels, in_channels = weight.shape[:2]
    if in_channels * groups != channels:
        raise ValueError(
            f"x has {channels} channels, but weight {list(weight.shape)} with groups={groups} "
            f"takes {in_channels * groups}"
        )
    if out_channels % groups:
        raise ValueError(f"groups={groups} does not divide the {out_channels} channels of weight")
    if bias is not None and bias.shape != (out_channels,):
        raise ValueError(f"bias must be [{out_channels}], got {list(bias.shape)}")
