"""A transposed convolution and the convolution behind it, composed into one: exact, and cheaper.

SparK's decoder up-samples by a 4 x 4 transposed convolution of stride 2, with a 3 x 3 convolution
right behind it. Together they are one linear operation: a 6 x 6 transposed convolution, which is a
3 x 3 convolution to four times the channels, at the low resolution, whose results lie side by side
(a pixel shuffle). It takes 36 multiplications for a position and a pair of channels, where the pair
takes 16 + 36, and the map between the two is neither made nor kept for the backward pass. The
parameters stay those of the pair: the kernel is composed in every forward pass.

Only along the border the two differ. The second convolution of the pair sees zeros around the
up-sampled map; the composed one sees the ring of values that the first would compute there if its
map went on. What the second one makes of that ring is computed and taken away.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv1d, conv2d, conv_transpose1d, conv_transpose2d

from convmae_kernels.ops.support.arithmetic import as_cast, product_dtype
from convmae_kernels.ops.support.autocast import autocast_dtype, without_autocast

# Composing is copies too, which its multiplications do not count, and the products of the pair are
# a little larger: the merged way is taken where it saves at least this share of multiplications.
LEAST_SAVING = 0.1


def up_sample_and_convolve(
    x: Tensor, up_weight: Tensor, up_bias: Tensor | None, conv_weight: Tensor
) -> Tensor:
    """`conv2d(conv_transpose2d(x, up_weight, up_bias, 2, padding=1), conv_weight, padding=1)`.

    Computed merged or as written, whichever takes fewer multiplications (`merging_pays`); the
    result is the same but for rounding.

    Args:
        x: `[B, C_in, H, W]`, float32, bfloat16, float16 or float64.
        up_weight: `[C_in, C_mid, 4, 4]`, as in `torch.nn.functional.conv_transpose2d`.
        up_bias: `[C_mid]` or None.
        conv_weight: `[C_out, C_mid, 3, 3]`, as in `torch.nn.functional.conv2d`.

    Returns:
        `[B, C_out, 2 * H, 2 * W]` in the dtype of `x`, or autocast's. Differentiable any number of
        times in all arguments.

    Raises:
        ValueError: shapes do not fit.
    """
    _check(x, up_weight, up_bias, conv_weight)
    batch, in_channels, height, width = x.shape
    out_channels, mid_channels = conv_weight.shape[:2]
    merged = merging_pays(batch, height, width, in_channels, mid_channels, out_channels)
    function = merged_up_sample_and_convolve if merged else plain_up_sample_and_convolve
    return function(x, up_weight, up_bias, conv_weight)


def merging_pays(
    batch: int,
    height: int,
    width: int,
    in_channels: int,
    mid_channels: int,
    out_channels: int,
) -> bool:
    """`merged <= (1 - LEAST_SAVING) * plain`, multiplications of a training step.

    For `i` input, `m` middle and `o` output channels, and `n = batch * height * width` positions
    of low resolution:

        plain  = n * (16 * i * m + 36 * m * o)
        merged = n * 36 * i * o + 144 * i * m * o + ring
        ring   = batch * 2 * (height + width) * (4 * i * m + 6 * m * o)

    Of the step and not of the forward pass: both have a gradient for both factors of each of their
    products, so all of it is three times as much, the 144 of composing the kernel included. With
    `c` channels everywhere, merging takes fewer multiplications from about `n = 9 * c` on.
    """
    plain, merged = pair_macs(batch, height, width, in_channels, mid_channels, out_channels)
    return merged <= (1 - LEAST_SAVING) * plain


def pair_macs(
    batch: int,
    height: int,
    width: int,
    in_channels: int,
    mid_channels: int,
    out_channels: int,
) -> tuple[int, int]:
    """Multiplications of a forward pass, plain and merged; see `merging_pays`."""
    positions = batch * height * width
    first, second = in_channels * mid_channels, mid_channels * out_channels
    ring = batch * 2 * (height + width) * (4 * first + 6 * second)
    composing = 144 * first * out_channels
    plain = positions * (16 * first + 36 * second)
    return plain, positions * 36 * in_channels * out_channels + composing + ring


def plain_up_sample_and_convolve(
    x: Tensor, up_weight: Tensor, up_bias: Tensor | None, conv_weight: Tensor
) -> Tensor:
    """`up_sample_and_convolve` as written."""
    _check(x, up_weight, up_bias, conv_weight)
    x, up_weight, up_bias, conv_weight, dtype = _cast(x, up_weight, up_bias, conv_weight)
    with without_autocast(x):
        y = conv_transpose2d(x, up_weight, up_bias, 2, padding=1)
        return conv2d(y.to(dtype).to(x.dtype), conv_weight, padding=1).to(dtype)


def merged_up_sample_and_convolve(
    x: Tensor, up_weight: Tensor, up_bias: Tensor | None, conv_weight: Tensor
) -> Tensor:
    """`up_sample_and_convolve` by one convolution; the result is in channels-last memory format."""
    _check(x, up_weight, up_bias, conv_weight)
    x, up_weight, up_bias, conv_weight, dtype = _cast(x, up_weight, up_bias, conv_weight)
    with without_autocast(x):
        kernel = compose(up_weight, conv_weight)
        bias = None
        if up_bias is not None:  # what the second convolution makes of it, away from the border
            bias = (conv_weight.sum((2, 3)) @ up_bias).repeat(4)
        y = conv2d(x, kernel, bias, padding=1)
        ring = _beyond_the_border(x, up_weight, up_bias, conv_weight)
        return _Assemble.apply(y, *ring).to(dtype)


def compose(up_weight: Tensor, conv_weight: Tensor) -> Tensor:
    """The kernel of the merged convolution: `[4 * C_out, C_in, 3, 3]`, in four groups of `C_out`.

    Group `2 * r + c` has the outputs at rows `2 * i + r` and columns `2 * j + c`. The two kernels
    are multiplied, tap by tap, and the products that lead to the same place are added: a 6 x 6
    kernel, `conv2d(up_weight, conv_weight, padding=2)`, with less than half its multiplications.
    """
    six = _Compose.apply(up_weight, conv_weight)  # [C_out, 6, 6, C_in]
    # Row r of two takes input row i + 1 - e by row r + 2 * e of the six.
    groups = six.unflatten(2, (3, 2)).unflatten(1, (3, 2)).flip(1, 3)
    return groups.permute(2, 4, 0, 1, 3, 5).flatten(0, 2).permute(0, 3, 1, 2)


class _Compose(torch.autograd.Function):
    """`[C_in, C_mid, 4, 4], [C_out, C_mid, 3, 3] -> [C_out, 6, 6, C_in]`, see `compose`.

    Tap `j` of the second kernel moves what tap `i` of the first one makes to `i + 2 - j`. So each
    tap of the second kernel is multiplied with the whole first one, and the product added where it
    belongs, in float32 at least.
    """

    @staticmethod
    def forward(ctx, up_weight, conv_weight):
        ctx.save_for_backward(up_weight, conv_weight)
        first, second = _first_matrix(up_weight), _second_matrices(conv_weight)
        out_channels, in_channels = conv_weight.shape[0], up_weight.shape[0]
        wide = torch.promote_types(first.dtype, torch.float32)
        six = first.new_zeros(out_channels, 6, 6, in_channels, dtype=wide)
        for i, j in SECOND_TAPS:
            product = (second[i, j] @ first).view(out_channels, 4, 4, in_channels)
            six[:, 2 - i : 6 - i, 2 - j : 6 - j] += product
        return six.to(up_weight.dtype)

    @staticmethod
    def backward(ctx, grad):
        up_weight, conv_weight = ctx.saved_tensors
        first, second = _first_matrix(up_weight), _second_matrices(conv_weight)
        grad_first, grad_second = torch.zeros_like(first), []
        for i, j in SECOND_TAPS:
            part = grad[:, 2 - i : 6 - i, 2 - j : 6 - j].flatten(1)  # [C_out, 16 * C_in]
            grad_first = torch.addmm(grad_first, second[i, j].t(), part)
            grad_second.append(part @ first.t())
        in_channels, mid_channels = up_weight.shape[:2]
        grad_up = grad_first.view(mid_channels, 4, 4, in_channels).permute(3, 0, 1, 2)
        return grad_up, torch.stack(grad_second, dim=2).view_as(conv_weight)


SECOND_TAPS = tuple((i, j) for i in range(3) for j in range(3))


def _first_matrix(up_weight: Tensor) -> Tensor:
    """`[C_in, C_mid, 4, 4] -> [C_mid, 16 * C_in]`."""
    return up_weight.permute(1, 2, 3, 0).flatten(1)


def _second_matrices(conv_weight: Tensor) -> Tensor:
    """`[C_out, C_mid, 3, 3] -> [3, 3, C_out, C_mid]`."""
    return conv_weight.permute(2, 3, 0, 1).contiguous()


def _beyond_the_border(
    x: Tensor, up_weight: Tensor, up_bias: Tensor | None, conv_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the ring around the up-sampled map adds to the first and last rows and columns.

    The pair itself, in one dimension: of the ring above, the first row of `x` by the first row of
    the first kernel, then by the first row of the second; so it is on all four sides. The rows
    include the corners of the ring, the columns do not.

    Returns:
        Two `[B, C_out, 2 * W]` and two `[B, C_out, 2 * H]`: top, bottom, left, right.
    """
    sides = []
    for last in (0, -1):
        ring = conv_transpose1d(x[:, :, last], up_weight[:, :, last], up_bias, 2)
        sides.append(conv1d(ring, conv_weight[:, :, last]))
    for last in (0, -1):
        line = x[:, :, :, last]
        ring = conv_transpose1d(line, up_weight[:, :, :, last], up_bias, 2, padding=1)
        sides.append(conv1d(ring, conv_weight[:, :, :, last], padding=1))
    top, bottom, left, right = sides
    return top, bottom, left, right


class _Assemble(torch.autograd.Function):
    """`[B, 4 * C, H, W]` to `[B, C, 2 * H, 2 * W]`, less the sides: one copy, forward and backward.

    The order of the four groups of channels is that of `compose`.
    """

    @staticmethod
    def forward(ctx, y, top, bottom, left, right):
        batch, channels, height, width = y.shape[0], y.shape[1] // 4, *y.shape[2:]
        maps = y.view(batch, 2, 2, channels, height, width)
        maps = maps.permute(0, 4, 1, 5, 2, 3).contiguous()  # [B, H, 2, W, 2, C]
        maps = maps.view(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)
        maps[:, :, 0] -= top
        maps[:, :, -1] -= bottom
        maps[:, :, :, 0] -= left
        maps[:, :, :, -1] -= right
        return maps

    @staticmethod
    def backward(ctx, grad):
        batch, channels, height, width = grad.shape
        groups = grad.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 3, 5, 1)
        groups = groups.reshape(batch, height // 2, width // 2, 4 * channels).permute(0, 3, 1, 2)
        sides = (grad[:, :, 0], grad[:, :, -1], grad[:, :, :, 0], grad[:, :, :, -1])
        return groups, *(-side for side in sides)


def _cast(
    x: Tensor, up_weight: Tensor, up_bias: Tensor | None, conv_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, torch.dtype]:
    """The operands in the dtype to multiply in, and the dtype of the result.

    They are rounded to autocast's dtype first, and multiplied wider where the CPU has no such
    product, as in `multiply`.
    """
    dtype = autocast_dtype(x)
    x = x.to(dtype)
    wide = product_dtype(x)

    def cast(t: Tensor) -> Tensor:
        return as_cast(t).to(dtype).to(wide)

    bias = None if up_bias is None else cast(up_bias)
    return x.to(wide), cast(up_weight), bias, cast(conv_weight), dtype


def _check(x: Tensor, up_weight: Tensor, up_bias: Tensor | None, conv_weight: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"x must be [B, C_in, H, W], got {list(x.shape)}")
    if up_weight.dim() != 4 or up_weight.shape[0] != x.shape[1] or up_weight.shape[2:] != (4, 4):
        raise ValueError(
            f"up_weight must be [{x.shape[1]}, C_mid, 4, 4] for x of {x.shape[1]} channels, got "
            f"{list(up_weight.shape)}"
        )
    channels = up_weight.shape[1]
    if up_bias is not None and up_bias.shape != (channels,):
        raise ValueError(f"up_bias must be [{channels}], got {list(up_bias.shape)}")
    if (
        conv_weight.dim() != 4
        or conv_weight.shape[1] != channels
        or conv_weight.shape[2:] != (3, 3)
    ):
        raise ValueError(
            f"conv_weight must be [C_out, {channels}, 3, 3], got {list(conv_weight.shape)}"
        )
