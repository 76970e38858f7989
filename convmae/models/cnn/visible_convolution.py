"""Convolutions of maps whose hidden positions all hold one vector, a token: exact, and cheaper.

A convolution is linear. So the packed rows of the visible positions and one row for the token are
multiplied with every tap of the kernel, and each position of the dense result adds up the products
that meet it. Of the dense operations only the visible share is left, in all three gradients too.

One table says which products an output adds; PyTorch's `embedding_bag` adds them, in the order of
the table. The gradient reads the same table the other way round, so there are no atomics: the same
input gives the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d, embedding_bag, linear, pad

from convmae_kernels.ops import scatter_visible
from convmae_kernels.ops.masked_conv2d import check_parameters
from convmae_kernels.ops.support.arithmetic import as_cast, product_dtype
from convmae_kernels.ops.support.autocast import autocast_dtype, autocast_is_on, without_autocast
from convmae_kernels.ops.support.checks import check_packed
from convmae_kernels.zorder import from_zorder, to_zorder

if TYPE_CHECKING:
    from collections.abc import Callable

    from convmae_kernels import BlockMask

# Visible share from which the dense way is used: adding up the products costs about as much as a
# fifth of the dense convolution, so that nothing is left to save.
DENSE_FROM = 0.8


def convolve_with_token(
    features: Tensor, mask: BlockMask, token: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """`conv2d(fill_with_token(features, mask, token), weight, bias, padding=k // 2)`.

    The projection of a level of SparK: the dense map is neither made nor kept for the backward
    pass, and the multiplications, forward and backward, are those of the visible positions. From a
    visible share of `DENSE_FROM` on it is computed as written.

    Args:
        features: packed features `[T, s*s, C_in]`, float32, bfloat16, float16 or float64.
        mask: the mask that they were packed with.
        token: what every hidden position holds, `[C_in]` or `[1, C_in, 1, 1]`.
        weight: `[C_out, C_in, k, k]` with `k` odd, as in `torch.nn.functional.conv2d`.
        bias: `[C_out]` or None.

    Returns:
        `[B, C_out, gh*s, gw*s]` in channels-last memory format, in the dtype of `features`, or
        autocast's. Differentiable any number of times in all floating arguments.

    Raises:
        TypeError: an argument is not a tensor of one of the dtypes, or dtypes differ.
        ValueError: shapes or devices do not fit, or the kernel is not a square of odd side.
    """
    side = _check(features, mask, token, weight, bias, in_axis=1)
    kernel = weight.shape[2]
    if kernel != weight.shape[3] or kernel % 2 == 0:
        raise ValueError(
            f"weight must be [C_out, C_in, k, k] with an odd k, got {list(weight.shape)}"
        )

    def dense(maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return conv2d(maps, weight, bias, padding=kernel // 2)

    # Weight [o, c, i, j] meets outputs i and j positions before the last that an input reaches.
    taps = _Taps(side, kernel, 1, kernel // 2, backwards=True)
    return _by_taps(features, mask, token, weight, bias, (2, 3, 0, 1), taps, dense)


def up_sample_with_token(
    features: Tensor, mask: BlockMask, token: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """`conv_transpose2d(fill_with_token(features, mask, token), weight, bias, 2, padding=1)`.

    The first up-sampling of SparK's decoder, whose input is the coarsest level alone; see
    `convolve_with_token`.

    Args:
        features: packed features `[T, s*s, C_in]`, float32, bfloat16, float16 or float64.
        mask: the mask that they were packed with.
        token: what every hidden position holds, `[C_in]` or `[1, C_in, 1, 1]`.
        weight: `[C_in, C_out, 4, 4]`, as in `torch.nn.functional.conv_transpose2d`.
        bias: `[C_out]` or None.

    Returns:
        `[B, C_out, 2*gh*s, 2*gw*s]` in channels-last memory format, in the dtype of `features`, or
        autocast's. Differentiable any number of times in all floating arguments.

    Raises:
        TypeError: an argument is not a tensor of one of the dtypes, or dtypes differ.
        ValueError: shapes or devices do not fit, or the kernel is not 4 x 4.
    """
    side = _check(features, mask, token, weight, bias, in_axis=0)
    if weight.shape[2:] != (4, 4):
        raise ValueError(f"weight must be [C_in, C_out, 4, 4], got {list(weight.shape)}")

    def dense(maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return conv_transpose2d(maps, weight, bias, 2, padding=1)

    taps = _Taps(side, 4, 2, 1, backwards=False)
    return _by_taps(features, mask, token, weight, bias, (2, 3, 1, 0), taps, dense)


def project_with_token(
    features: Tensor, token: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A 1x1 convolution of a map whose hidden positions hold `token`: of rows, and of the token.

    The map stays packed: `fill_with_token(*results)` is the convolution of
    `fill_with_token(features, mask, token)`. So it is for SparK's coarsest level, whose up-sampling
    takes packed features and a token again (`up_sample_with_token`).

    Args:
        features: packed features `[T, s*s, C_in]`, float32, bfloat16, float16 or float64.
        token: what every hidden position holds, `[C_in]` or `[1, C_in, 1, 1]`.
        weight: `[C_out, C_in, 1, 1]`.
        bias: `[C_out]` or None.

    Returns:
        Packed features `[T, s*s, C_out]` and the token `[C_out]`, in the dtype of `features`, or
        autocast's.

    Raises:
        TypeError: a dtype differs from that of `features`.
        ValueError: shapes or devices do not fit.
    """
    _check_operands(features, token, weight, bias, in_axis=1)
    if weight.shape[2:] != (1, 1):
        raise ValueError(f"weight must be [C_out, C_in, 1, 1], got {list(weight.shape)}")
    blocks, positions, _ = features.shape
    features, token, weight, bias, dtype = _cast(features, token, weight, bias)
    with without_autocast(features):
        rows = torch.cat([features.flatten(0, 1), token.view(1, -1)])
        rows = linear(rows, weight.flatten(1), bias).to(dtype)
    return rows[:-1].view(blocks, positions, weight.shape[0]), rows[-1]


def fill_with_token(features: Tensor, mask: BlockMask, token: Tensor) -> Tensor:
    """`where(visible, scatter(features), token)`: the dense map with `token` at hidden positions.

    Args:
        features: packed features `[T, s*s, C]`, float32, bfloat16, float16 or float64.
        mask: the mask that they were packed with.
        token: what every hidden position holds, `[C]` or `[1, C, 1, 1]`; cast to the dtype of
            `features`.

    Returns:
        `[B, C, gh*s, gw*s]` in channels-last memory format, in the dtype of `features`.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices do not fit.
    """
    side = check_packed("features", features, mask)
    _check_token(token, features)
    visible = mask.to_dense(side)
    return torch.where(
        visible, scatter_visible(features, mask), token.to(features.dtype).view(1, -1, 1, 1)
    )


# -- products of rows and taps --------------------------------------------------------------------


class _Taps(NamedTuple):
    """What a kernel does along one axis: input `i` reaches output `stride * i + t - margin`.

    `t` is from 0 to `kernel - 1`; the weight that it stands for is the one of that number, or,
    `backwards`, of the same number from the end. Outputs before 0 or beyond the map do not exist.

    Attributes:
        side: input positions of a block in a row.
        kernel, stride, margin, backwards: see above; the kernel is divisible by the stride.
    """

    side: int
    kernel: int
    stride: int
    margin: int
    backwards: bool

    @property
    def products(self) -> int:
        """The products of a row: taps of the kernel."""
        return self.kernel * self.kernel

    @property
    def out_side(self) -> int:
        """Output positions of a block in a row."""
        return self.side * self.stride


def _by_taps(
    features: Tensor,
    mask: BlockMask,
    token: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    order: tuple[int, ...],
    taps: _Taps,
    dense: Callable[[Tensor, Tensor, Tensor | None], Tensor],
) -> Tensor:
    """The result by products, or by `dense(map, weight, bias)`; see `DENSE_FROM`.

    `order` permutes the weight to `[k, k, C_out, C_in]`.
    """
    features, token, weight, bias, dtype = _cast(features, token, weight, bias)
    with without_autocast(features):
        if mask.density >= DENSE_FROM or mask.num_blocks == 0:
            y = dense(fill_with_token(features, mask, token), weight, bias)
            return y.contiguous(memory_format=torch.channels_last).to(dtype)
        outside = token.new_zeros(1, token.shape[0])
        rows = torch.cat([features.flatten(0, 1), token.unsqueeze(0), outside])
        products = linear(rows, weight.permute(order).flatten(0, 2))
        products = products.unflatten(1, (taps.products, -1))
        table, grid = _table(mask, taps), (mask.batch_size, *mask.grid)
        y = _AddProducts.apply(products, bias, table, mask.block_index, grid, taps)
    return y.to(dtype).permute(0, 3, 1, 2)


class _AddProducts(torch.autograd.Function):
    """Products `[N + 2, k*k, C_out]` to the map `[B, H, W, C_out]`: sums of what a position meets.

    The rows are those of the `N` visible positions, of the token, and of zeros, which stands for
    all that lies outside the picture.
    """

    @staticmethod
    def forward(ctx, products, bias, table, block_index, grid, taps):
        ctx.save_for_backward(table, block_index)
        ctx.grid, ctx.taps, ctx.has_bias = grid, taps, bias is not None
        flat = products.flatten(0, 1)
        if table.shape[1] == 1:
            y = flat.index_select(0, table.flatten())
        else:
            y = embedding_bag(table, flat, mode="sum")
        if bias is not None:
            y += bias
        (batch, gh, gw), side = grid, taps.out_side
        return y.view(batch, gh * side, gw * side, products.shape[2])

    @staticmethod
    def backward(ctx, grad):
        table, block_index = ctx.saved_tensors
        grad_products = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_products = _CollectGradient.apply(grad, table, block_index, ctx.grid, ctx.taps)
        if ctx.has_bias and ctx.needs_input_grad[1]:
            grad_bias = grad.sum((0, 1, 2))
        return grad_products, grad_bias, None, None, None, None


class _CollectGradient(torch.autograd.Function):
    """The gradient of `_AddProducts` in the products, `[B, H, W, C_out] -> [N + 2, k*k, C_out]`."""

    @staticmethod
    def forward(ctx, grad, table, block_index, grid, taps):
        ctx.save_for_backward(table, block_index)
        ctx.grid, ctx.taps = grid, taps
        channels, token_row = grad.shape[3], block_index.shape[0] * taps.side**2
        around = pad(grad, (0, 0, *(taps.margin,) * 4)).flatten(0, 2)
        reached = pad(_reached(block_index, grid, taps), (0, 0, 0, 2))  # two rows to be written yet
        products = around.index_select(0, reached.flatten()).unflatten(0, reached.shape)
        tap = table % taps.products
        met = grad.new_zeros(table.shape[0], taps.products)
        met.scatter_(1, tap.long(), (table // taps.products == token_row).to(grad.dtype))
        products[token_row] = met.t() @ grad.reshape(-1, channels)
        products[token_row + 1] = 0
        return products

    @staticmethod
    def backward(ctx, grad):
        table, block_index = ctx.saved_tensors
        y = _AddProducts.apply(grad, None, table, block_index, ctx.grid, ctx.taps)
        return y, None, None, None, None


# -- which products meet where --------------------------------------------------------------------


def _table(mask: BlockMask, taps: _Taps) -> Tensor:
    """Which products each output adds: `[B * H * W, n]`, numbers `row * k*k + weight`."""
    places, device = taps.side**2, mask.device
    token_row = mask.num_visible * places
    # Along one axis: the inputs that the outputs of a block see, and through which weight.
    first = torch.arange(taps.out_side, device=device).unsqueeze(1) + taps.margin
    step = torch.arange(taps.kernel // taps.stride, device=device)
    inputs = first // taps.stride - step  # [out_side, n], negative above the block
    tap = first % taps.stride + taps.stride * step
    if taps.backwards:
        tap = taps.kernel - 1 - tap
    radius = -(-taps.margin // (taps.side * taps.stride))
    width = 2 * radius + 1
    block, place = inputs.div(taps.side, rounding_mode="floor") + radius, inputs % taps.side
    zorder = from_zorder(torch.arange(places, device=device).unsqueeze(0))[0]
    # Along both: [out_side, out_side, n, n], rows of outputs and of inputs first.
    rows, columns = (slice(None), None, slice(None), None), (None, slice(None), None, slice(None))
    block = (block[rows] * width + block[columns]).flatten()
    place = zorder[place[rows], place[columns]].flatten()
    tap = (tap[rows] * taps.kernel + tap[columns]).flatten()
    # Around every block of the grid: the rows of the visible blocks, the token's, that of zeros.
    visible = mask.visible
    row = torch.where(
        visible, (visible.flatten().cumsum(0) - 1).view_as(visible) * places, token_row
    )
    row = pad(row, (radius,) * 4, value=token_row + 1)
    row = row.unfold(1, width, 1).unfold(2, width, 1).reshape(mask.num_blocks, width * width)
    row = row.index_select(1, block)
    numbers = (row + torch.where(row < token_row, place, 0)) * taps.products + tap
    if (token_row + 2) * taps.products < 2**31:
        numbers = numbers.int()
    (gh, gw), side = mask.grid, taps.out_side
    sums = step.shape[0] ** 2
    numbers = numbers.view(mask.batch_size, gh, gw, side, side, sums).transpose(2, 3)
    return numbers.reshape(mask.num_blocks * side * side, sums)


def _reached(block_index: Tensor, grid: tuple[int, int, int], taps: _Taps) -> Tensor:
    """The output that each product goes to: `[N, k*k]`, positions of the map with its margins."""
    _, gh, gw = grid
    side, device = taps.out_side, block_index.device
    height, width = gh * side + 2 * taps.margin, gw * side + 2 * taps.margin
    image, place = block_index // (gh * gw), block_index % (gh * gw)
    first = (image * height + place // gw * side) * width + place % gw * side  # [T]
    tap = torch.arange(taps.kernel, device=device)
    if taps.backwards:
        tap = taps.kernel - 1 - tap
    # Position [y, x] of a block and tap [i, j]: the output y + i rows down, x + j to the right.
    axis = torch.arange(taps.side, device=device) * taps.stride
    down = (axis[:, None, None, None] + tap[:, None]) * width
    within = (down + axis[:, None, None] + tap).flatten(2)  # [s, s, k*k]
    within = to_zorder(within.permute(2, 0, 1)).t()
    return (first.view(-1, 1, 1) + within).flatten(0, 1)


# -- arguments ------------------------------------------------------------------------------------


def _cast(
    features: Tensor, token: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, torch.dtype]:
    """The operands in the dtype to multiply in, the token as `[C]`; and the dtype of the result.

    They are rounded to autocast's dtype first, and multiplied wider where the CPU has no such
    product, as in `multiply`.
    """
    dtype = autocast_dtype(features)
    wide = product_dtype(features.to(dtype)) if dtype != torch.float64 else dtype

    def cast(x: Tensor) -> Tensor:
        return x.to(dtype).to(wide)

    bias = None if bias is None else cast(as_cast(bias))
    return cast(features), cast(as_cast(token)).flatten(), cast(as_cast(weight)), bias, dtype


def _check(
    features: Tensor,
    mask: BlockMask,
    token: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_axis: int,
) -> int:
    """All operands fit each other and the mask; returns the side of a block."""
    side = check_packed("features", features, mask)
    _check_operands(features, token, weight, bias, in_axis)
    return side


def _check_operands(
    features: Tensor, token: Tensor, weight: Tensor, bias: Tensor | None, in_axis: int
) -> None:
    """`weight` is 4-D with the channels of `features` in axis `in_axis`; token and bias fit.

    Raises:
        TypeError, ValueError: they do not.
    """
    if features.dim() != 3:
        raise ValueError(f"features must be [T, s*s, C_in], got {list(features.shape)}")
    check_parameters(features, weight, bias)
    _check_token(token, features)
    if token.dtype != features.dtype and not autocast_is_on(features.device.type):
        raise TypeError(
            f"token is {token.dtype}, but features is {features.dtype}; they must be the same"
        )
    channels = features.shape[2]
    if weight.dim() != 4 or weight.shape[in_axis] != channels:
        raise ValueError(
            f"weight must have 4 dimensions and {channels} channels, those of features, in axis "
            f"{in_axis}, got {list(weight.shape)}"
        )
    out_channels = weight.shape[1 - in_axis]
    if bias is not None and bias.shape != (out_channels,):
        raise ValueError(f"bias must be [{out_channels}], got {list(bias.shape)}")


def _check_token(token: Tensor, features: Tensor) -> None:
    channels = features.shape[2]
    if tuple(token.shape) not in ((channels,), (1, channels, 1, 1)):
        raise ValueError(
            f"token must be [{channels}] or [1, {channels}, 1, 1], got {list(token.shape)}"
        )
    if token.device != features.device:
        raise ValueError(f"token is on {token.device}, but features is on {features.device}")
