"""What every op means, in plain PyTorch: the oracle of the tests and the any-device fallback.

Differentiable by autograd, `torch.func` and forward-mode alike. Half types accumulate in float32.

The ops register these functions and take nothing else from here. Nor is anything here taken from
`geometry`: which positions an output looks at follows from the definition of its op alone.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from convmae_kernels.ops.support.autocast import without_autocast
from convmae_kernels.ops.support.dtypes import accumulation_dtype
from convmae_kernels.zorder import from_zorder, to_zorder

if TYPE_CHECKING:
    from collections.abc import Sequence


def neighbour_table(visible: Tensor, block_index: Tensor, radius: int) -> Tensor:
    """bool `[B, gh, gw]`, its `[T]` visible blocks -> int32 `[T, (2 * radius + 1) ** 2]`.

    See `BlockMask.neighbours`; `block_index` is ascending.
    """
    side = 2 * radius + 1
    flat = visible.flatten()
    row = torch.where(flat, flat.cumsum(0) - 1, -1).to(torch.int32)
    row = torch.nn.functional.pad(row.view_as(visible), (radius,) * 4, value=-1)
    windows = row.unfold(1, side, 1).unfold(2, side, 1)  # [B, gh, gw, side, side]
    return windows.reshape(visible.numel(), side * side).index_select(0, block_index)


def gather_visible(images: Tensor, block_index: Tensor, gh: int, gw: int) -> Tensor:
    """`[B, C, gh*s, gw*s] -> [T, s*s, C]`: the visible blocks, their positions in Z-order."""
    batch, channels, height, width = images.shape
    tiles = images.reshape(batch, channels, gh, height // gh, gw, width // gw)
    tiles = tiles.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)  # [B*gh*gw, C, s, s]
    return to_zorder(tiles.index_select(0, block_index)).transpose(1, 2).contiguous()


def scatter_visible(
    x: Tensor, block_index: Tensor, batch: int, gh: int, gw: int, fill: float
) -> Tensor:
    """`[T, s*s, C] -> [B, C, gh*s, gw*s]` (channels-last): hidden positions hold `fill`."""
    _, positions, channels = x.shape
    side = math.isqrt(positions)
    tiles = x.new_full((batch * gh * gw, positions, channels), fill)
    tiles = tiles.index_copy(0, block_index, x)
    tiles = from_zorder(tiles.transpose(1, 2)).view(batch, gh, gw, channels, side, side)
    dense = tiles.permute(0, 1, 4, 2, 5, 3).reshape(batch, gh * side, gw * side, channels)
    return dense.contiguous().permute(0, 3, 1, 2)


def gather_windows(x: Tensor, neighbours: Tensor, halo: Sequence[int], fill: float) -> Tensor:
    """`[T, s*s, C] -> [T, top + s + bottom, left + s + right, C]`: blocks and what surrounds them.

    `halo` is `(top, bottom, left, right)`, in positions; hidden ones, and those outside the image,
    hold `fill`.
    """
    side, (top, bottom, left, right) = math.isqrt(x.shape[1]), halo
    rows, columns = range(-top, side + bottom), range(-left, side + right)
    return _cut(x, neighbours, rows, columns, fill)


def _cut(x: Tensor, neighbours: Tensor, rows: range, columns: range, fill: float) -> Tensor:
    """`[T, s*s, C] -> [T, rows, columns, C]` around each block, whose own first position is 0."""
    blocks, positions, channels = x.shape
    side, n = math.isqrt(positions), math.isqrt(neighbours.shape[1])
    tiles = from_zorder(x.transpose(1, 2)).permute(0, 2, 3, 1)  # [T, s, s, C]
    tiles = torch.cat([tiles, tiles.new_full((1, side, side, channels), fill)])
    index = neighbours.long()
    index = torch.where(index < 0, blocks, index)
    around = tiles.index_select(0, index.flatten()).view(blocks, n, n, side, side, channels)
    around = around.transpose(2, 3).reshape(blocks, n * side, n * side, channels)
    first, after = n // 2 * side, (n // 2 + 1) * side  # rows above a block, rows to the end
    if min(rows.start, columns.start) < -first or max(rows.stop, columns.stop) > after:
        raise ValueError(
            f"windows of rows {rows.start} to {rows.stop} and columns {columns.start} to "
            f"{columns.stop} reach beyond the neighbours, which are {n} x {n} blocks of side {side}"
        )
    wanted = [slice(first + part.start, first + part.stop) for part in (rows, columns)]
    return around[:, wanted[0], wanted[1]].contiguous()


def gather_windows_grad(grad: Tensor, neighbours: Tensor, halo: Sequence[int]) -> Tensor:
    """The gradient of `gather_windows` in `x`: the sum of what all windows hold of a position."""
    top, bottom, left, right = halo
    blocks, rows, _, channels = grad.shape
    side, n = rows - top - bottom, math.isqrt(neighbours.shape[1])
    reach, dtype = n // 2 * side, accumulation_dtype(grad.dtype)
    margins = (0, 0, reach - left, reach - right, reach - top, reach - bottom)
    windows = torch.nn.functional.pad(grad.to(dtype), margins)  # [T, n*s, n*s, C]
    windows = windows.view(blocks, n, side, n, side, channels)
    windows = torch.cat([windows, windows.new_zeros(1, *windows.shape[1:])])
    index = neighbours.long()
    index = torch.where(index < 0, blocks, index)
    x = grad.new_zeros(blocks, side, side, channels, dtype=dtype)
    for column in range(n * n):  # a block seen from the neighbour there lies opposite
        i, j = divmod(n * n - 1 - column, n)
        x = x + windows[:, i, :, j].index_select(0, index[:, column])
    return to_zorder(x.permute(0, 3, 1, 2)).transpose(1, 2).contiguous().to(grad.dtype)


def _taps(x: Tensor, neighbours: Tensor, kernel: Sequence[int], dilation: Sequence[int]):
    """Of every tap of an odd-sided kernel, its row, its column and what it meets `[T, s, s, C]`."""
    side = math.isqrt(x.shape[1])
    rows, columns = (d * (k // 2) for d, k in zip(dilation, kernel))
    windows = gather_windows(x, neighbours, (rows, rows, columns, columns), 0.0)
    for i in range(kernel[0]):
        top = i * dilation[0]
        for j in range(kernel[1]):
            left = j * dilation[1]
            yield i, j, windows[:, top : top + side, left : left + side]


def masked_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor, dilation: list[int]
) -> Tensor:
    """Depthwise: `y[p, c] = bias[c] + sum of weight[c, 0, d] * x[p + d, c]` over visible `p + d`.

    `x` is `[T, s*s, C]`, `weight` `[C, 1, kh, kw]`, `neighbours` from `BlockMask.neighbours`.
    """
    side, dtype = math.isqrt(x.shape[1]), accumulation_dtype(x.dtype)
    weight = weight.to(dtype)
    y = x.new_zeros(x.shape[0], side, side, x.shape[2], dtype=dtype)
    if bias is not None:
        y = y + bias.to(dtype)
    for i, j, met in _taps(x.to(dtype), neighbours, weight.shape[2:], dilation):
        y = y + weight[:, 0, i, j] * met
    return to_zorder(y.permute(0, 3, 1, 2)).transpose(1, 2).contiguous().to(x.dtype)


def masked_conv2d_weight_grad(
    grad: Tensor, x: Tensor, neighbours: Tensor, kernel: list[int], dilation: list[int]
) -> tuple[Tensor, Tensor]:
    """Gradients of `masked_conv2d` in its weight `[C, 1, kh, kw]` and its bias `[C]`."""
    result, dtype = x.dtype, accumulation_dtype(x.dtype)
    grad = from_zorder(grad.to(dtype).transpose(1, 2)).permute(0, 2, 3, 1)  # [T, s, s, C]
    taps = [
        (grad * met).sum((0, 1, 2))
        for _, _, met in _taps(x.to(dtype), neighbours, kernel, dilation)
    ]
    grad_weight = torch.stack(taps, dim=1).view(-1, 1, kernel[0], kernel[1])
    return grad_weight.to(result), grad.sum((0, 1, 2)).to(result)


def masked_conv2d_grads(
    grad: Tensor, x: Tensor, weight: Tensor, neighbours: Tensor, dilation: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `masked_conv2d` in `x`, its weight `[C, 1, kh, kw]` and its bias `[C]`."""
    grad_x = masked_conv2d(grad, weight.flip(2, 3), None, neighbours, dilation)
    kernel = list(weight.shape[2:])
    return grad_x, *masked_conv2d_weight_grad(grad, x, neighbours, kernel, dilation)


def window_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    neighbours: Tensor,
    stride: int,
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """`conv2d` of every block's window: `[T, s*s, C_in] -> [T, (s / stride) ** 2, C_out]`.

    `padding` and `dilation` are pairs; the kernel reaches `padding` above and left of a block, and
    as far below and right of it as its size leaves.
    """
    side, dtype = math.isqrt(x.shape[1]), accumulation_dtype(x.dtype)
    rows, columns = (
        range(-p, side - stride - p + d * (k - 1) + 1)  # from the first tap of the first output
        for k, p, d in zip(weight.shape[2:], padding, dilation)  # to the last tap of the last
    )
    windows = _cut(x.to(dtype), neighbours, rows, columns, 0.0).permute(0, 3, 1, 2)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    with without_autocast(x):
        y = torch.nn.functional.conv2d(windows, weight, bias, stride, 0, dilation, groups)
    return to_zorder(y).transpose(1, 2).contiguous().to(x.dtype)


def grouped_conv2d_input_grad(
    grad: Tensor,
    weight: Tensor,
    neighbours: Tensor,
    stride: int,
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The gradient of `window_conv2d` in `x`: `[T, (s / stride) ** 2, C_out] -> [T, s*s, C_in]`."""
    dtype = accumulation_dtype(grad.dtype)
    tiles = from_zorder(grad.to(dtype).transpose(1, 2))  # [T, C_out, s / stride, s / stride]
    with without_autocast(grad):
        windows = torch.nn.functional.conv_transpose2d(
            tiles, weight.to(dtype), None, stride, 0, 0, groups, dilation
        )
    top, left = padding
    side = tiles.shape[2] * stride
    bottom, right = windows.shape[2] - top - side, windows.shape[3] - left - side
    halo = (top, bottom, left, right)
    x = gather_windows_grad(windows.permute(0, 2, 3, 1), neighbours, halo)
    return x.to(grad.dtype)


def grouped_conv2d_weight_grad(
    grad: Tensor,
    x: Tensor,
    neighbours: Tensor,
    kernel: Sequence[int],
    stride: int,
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    """The gradients of `window_conv2d` in its weight and its bias."""
    dtype, side = accumulation_dtype(x.dtype), math.isqrt(x.shape[1])
    tiles = from_zorder(grad.to(dtype).transpose(1, 2)).unflatten(1, (groups, -1))
    rows, columns = (
        range(-p, side - stride - p + d * (k - 1) + 1) for k, p, d in zip(kernel, padding, dilation)
    )
    windows = _cut(x.to(dtype), neighbours, rows, columns, 0.0).permute(0, 3, 1, 2)
    windows, last = windows.unflatten(1, (groups, -1)), side - stride + 1
    taps = []
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            top, left = i * dilation[0], j * dilation[1]
            met = windows[..., top : top + last : stride, left : left + last : stride]
            with without_autocast(x):
                taps.append(torch.einsum("tgohw,tgihw->goi", tiles, met).flatten(0, 1))
    grad_weight = torch.stack(taps, dim=2).unflatten(2, tuple(kernel))
    return grad_weight.to(x.dtype), tiles.sum((0, 3, 4)).flatten().to(x.dtype)


def strided_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    neighbours: Tensor,
    stride: int,
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Depthwise: `window_conv2d` of as many groups as channels."""
    channels = x.shape[2]
    return window_conv2d(x, weight, bias, neighbours, stride, padding, dilation, channels)


def strided_conv2d_input_grad(
    grad: Tensor,
    weight: Tensor,
    neighbours: Tensor,
    stride: int,
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The gradient of `strided_conv2d` in `x`."""
    channels = grad.shape[2]
    return grouped_conv2d_input_grad(grad, weight, neighbours, stride, padding, dilation, channels)


def strided_conv2d_weight_grad(
    grad: Tensor,
    x: Tensor,
    neighbours: Tensor,
    kernel: Sequence[int],
    stride: int,
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The gradients of `strided_conv2d` in its weight and its bias."""
    channels = x.shape[2]
    return grouped_conv2d_weight_grad(
        grad, x, neighbours, kernel, stride, padding, dilation, channels
    )


# -- around the products --------------------------------------------------------------------------


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """`gelu(x + bias)`, with the error function: `[..., C]`, `[C]` -> `[..., C]` like `x`."""
    wide = accumulation_dtype(x.dtype)
    return torch.nn.functional.gelu(x.to(wide) + bias.to(wide)).to(x.dtype).contiguous()


def bias_gelu_grad(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `bias_gelu` in x and bias, given that of its result.

    `gelu'(z)` is the probability that a standard normal number is less than `z`, plus `z` times its
    density there.
    """
    wide = accumulation_dtype(x.dtype)
    z = x.to(wide) + bias.to(wide)
    probability = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    grad_z = grad.to(wide) * (probability + z * density)
    grad_bias = grad_z.flatten(0, -2).sum(0).to(bias.dtype)
    return grad_z.to(x.dtype).contiguous(), grad_bias


def add_layer_norm(
    x: Tensor,
    branch: Tensor,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`total = x + branch + branch_bias`, and `layer_norm(total, weight, bias, eps)`.

    All `[..., C]` and `[C]`. The total is in the dtype to which `x` and `branch` promote, and the
    norm, of the total as it is rounded, in that of `branch`.
    """
    dtype = torch.promote_types(x.dtype, branch.dtype)
    wide = accumulation_dtype(dtype)
    total = branch.to(wide) if branch_bias is None else branch.to(wide) + branch_bias.to(wide)
    total = (x.to(wide) + total).to(dtype).contiguous()
    normed, _ = _normalise(total.to(wide), eps)
    return total, (normed * weight.to(wide) + bias.to(wide)).to(branch.dtype)


def add_layer_norm_grad(
    grad_normed: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    eps: float,
    has_branch_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `add_layer_norm` in x, weight, bias and branch bias, given those of its
    results.

    That in x, which is that in the branch too, has the dtype of `total`, the others that of
    `weight`. Without a branch bias the last is `[0]`.
    """
    wide = accumulation_dtype(total.dtype)
    normed, scale = _normalise(total.to(wide), eps)
    grad = grad_normed.to(wide)
    grad_weight, grad_bias = (grad * normed).flatten(0, -2).sum(0), grad.flatten(0, -2).sum(0)
    grad = grad * weight.to(wide)
    along = (grad * normed).mean(-1, keepdim=True)
    grad = (grad - grad.mean(-1, keepdim=True) - normed * along) * scale
    if grad_total is not None:
        grad = grad + grad_total.to(wide)
    of_branch = grad.flatten(0, -2).sum(0) if has_branch_bias else grad.new_zeros(0)
    vectors = (grad_weight, grad_bias, of_branch)
    grad_weight, grad_bias, of_branch = (vector.to(weight.dtype) for vector in vectors)
    return grad.to(total.dtype).contiguous(), grad_weight, grad_bias, of_branch


def _normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Rows less their means, over their deviations; and 1 / deviations."""
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * scale, scale
