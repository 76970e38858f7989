"""What functions that look at several positions do with `Packed`: see `functions`.

Convolutions, transposed ones, pooling, padding, resampling, and what a grid of blocks cannot have.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convmae_kernels import ops
from convmae_kernels.functional import pooling
from convmae_kernels.functional.borders import NOTHING, Border, border_windows
from convmae_kernels.functional.resampling import masked_interpolate, power_of_two
from convmae_kernels.ops.support import geometry
from convmae_kernels.ops.support.arithmetic import multiply
from convmae_kernels.ops.support.checks import check_packed
from convmae_kernels.packed.axes import NCHW, NHWC
from convmae_kernels.packed.map_like import handles
from convmae_kernels.packed.packed import HANDLERS, Packed
from convmae_kernels.packed.padded import PADDED_HANDLERS, Padded, unpadded
from convmae_kernels.packed.refused import NO_INDICES, WHY_REFUSED, refuse
from convmae_kernels.zorder import rows_to_zorder

if TYPE_CHECKING:
    from collections.abc import Callable

_handles = partial(handles, HANDLERS)


def _handles_padded(*functions: Callable) -> Callable:
    """Decorates a handler of maps with and without padding."""

    def add(handler: Callable) -> Callable:
        PADDED_HANDLERS.update(dict.fromkeys(functions, handler))
        HANDLERS.update(dict.fromkeys(functions, handler))
        return handler

    return add


def _check_nchw(x: Any) -> Packed:
    """The map without its padding, `[B, C, H, W]`."""
    source = unpadded(x)
    if not isinstance(source, Packed) or source.axes != NCHW:
        raise ValueError(f"it needs [B, C, H, W], got {tuple(x.shape)}")
    return source


def _border(x: Any) -> Border:
    return x.border if isinstance(x, Padded) else NOTHING


def _both(value: Any) -> tuple[Any, ...]:
    """A value for rows and one for columns."""
    if isinstance(value, (list, tuple)):
        return (value[0], value[0]) if len(value) == 1 else tuple(value)
    return value, value


def _plain(value: Any) -> Any:
    """One number of a list of one, a tuple of a list of two."""
    if isinstance(value, (list, tuple)):
        return value[0] if len(value) == 1 else tuple(value)
    return value


# -- padding --------------------------------------------------------------------------------------


@_handles_padded(F.pad)
def _pad(func, input, pad, mode="constant", value=None):
    source, pad = unpadded(input), tuple(pad)
    if len(pad) % 2 or len(pad) > 8:
        raise ValueError(f"pad must be up to four pairs of numbers, got {pad}")
    pairs = [*zip(pad[::2], pad[1::2]), *[(0, 0)] * 4][:4]  # from the last dimension on
    columns, rows, channels = pairs[:3]
    if source.axes == NHWC:
        channels, columns, rows = pairs[:3]
    elif source.axes != NCHW:
        raise NotImplementedError(f"it needs [B, C, H, W] or [B, H, W, C], got {source.axes}")
    value = 0.0 if value is None else float(value)
    if pairs[3] != (0, 0):
        raise NotImplementedError("images cannot be added to the batch")
    if channels != (0, 0):
        if mode != "constant" or isinstance(input, Padded):
            raise NotImplementedError("channels can only be added as constants, before positions")
        source = input = source.like(F.pad(source.features, channels, value=value))
    if rows == columns == (0, 0):
        return input
    _check_nchw(input)
    border = Border(*rows, *columns, mode, value)
    _check_border(source, border)
    if not isinstance(input, Padded):
        return Padded(source, border)
    first = input.border
    if (mode, value) != (first.mode, first.value) or mode != "constant" or min(first[:4]) < 0:
        raise NotImplementedError("padding of two kinds, one around the other, is not supported")
    return Padded(source, Border(*map(sum, zip(first[:4], border[:4])), mode, value))


def _check_border(source: Packed, border: Border) -> None:
    """The border can be made of what the blocks hold."""
    top, bottom, left, right = border[:4]
    if border.mode == "circular":
        raise NotImplementedError(
            "mode='circular' shows the opposite side of the image, which is not near the blocks"
        )
    height, width = source.shape[2:]
    if border.mode not in ("constant", "reflect", "replicate"):
        raise ValueError(f"mode must be constant, reflect or replicate, got {border.mode!r}")
    if border.mode != "constant" and min(border[:4]) < 0:
        raise NotImplementedError(f"negative padding needs mode='constant', got {border.mode!r}")
    if border.mode == "reflect" and (max(top, bottom) >= height or max(left, right) >= width):
        raise ValueError(f"reflected padding {border[:4]} must be less than {height} x {width}")
    if min(top, bottom) <= -height or min(left, right) <= -width:
        raise ValueError(f"padding {border[:4]} leaves nothing of {height} x {width}")


# -- convolutions ---------------------------------------------------------------------------------


@_handles_padded(torch.conv2d, F.conv2d)
def _conv2d(func, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    source, border = _check_nchw(input), _border(input)
    stride, padding, dilation = _plain(stride), _plain(padding), _plain(dilation)
    x, mask = source.features, source.mask
    spans = [d * (k - 1) for k, d in zip(weight.shape[2:], _both(dilation))]
    own = _own_padding(padding, spans)
    if isinstance(input, Packed):
        if padding == "same" and any(before != after for before, after in own):
            padding = own
        y = ops.masked_conv2d(x, weight, bias, mask, stride, dilation, groups, padding=padding)
        return source.like(y)
    sides = tuple(
        (a + before, b + after) for (a, b), (before, after) in zip((border[:2], border[2:4]), own)
    )
    hidden = border.mode == "constant" and border.value == 0
    if hidden and (min(border[:4]) >= 0 or not any(map(any, own))):
        y = ops.masked_conv2d(x, weight, bias, mask, stride, dilation, groups, padding=sides)
        return source.like(y)
    side = check_packed("x", x, mask)
    step, steps = geometry.check_stride(stride, side), geometry.pair("dilation", dilation)
    margins = geometry.check_padding(sides, tuple(weight.shape[2:]), step, steps)
    halo = geometry.window_halo(weight.shape[2:], step, margins, steps)
    windows = border_windows(x, mask, halo, border).permute(0, 3, 1, 2)

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, step, 0, steps, groups)

    y = multiply(convolve, windows, weight, bias)
    return source.like(rows_to_zorder(y.permute(0, 2, 3, 1)))


def _own_padding(padding: Any, spans: list[int]) -> tuple[tuple[int, int], ...]:
    """`((top, bottom), (left, right))` of a convolution; "same" has the odd position behind."""
    if padding == "same":
        return tuple((span // 2, span - span // 2) for span in spans)
    return tuple((p, p) for p in _both(0 if padding == "valid" else padding))


@_handles(torch.conv_transpose2d, F.conv_transpose2d)
def _conv_transpose2d(
    func,
    input,
    weight,
    bias=None,
    stride=1,
    padding=0,
    output_padding=0,
    groups=1,
    dilation=1,
):
    source = _check_nchw(input)
    sizes = map(_plain, (stride, padding, output_padding, groups, dilation))
    y = ops.masked_conv_transpose2d(source.features, weight, bias, source.mask, *sizes)
    return source.like(y)


# -- pooling --------------------------------------------------------------------------------------


@_handles_padded(torch.max_pool2d, F.max_pool2d)
def _max_pool2d(
    func,
    input,
    kernel_size,
    stride=None,
    padding=0,
    dilation=1,
    ceil_mode=False,
    return_indices=False,
):
    source = _check_nchw(input)
    if return_indices:
        raise NotImplementedError(NO_INDICES)
    sizes = (_plain(v) for v in (kernel_size, stride or kernel_size, padding, dilation))
    y = pooling.masked_max_pool2d(
        source.features, source.mask, *sizes, ceil_mode, border=_border(input)
    )
    return source.like(y)


@_handles_padded(torch._C._nn.avg_pool2d, F.avg_pool2d)
def _avg_pool2d(
    func,
    input,
    kernel_size,
    stride=None,
    padding=0,
    ceil_mode=False,
    count_include_pad=True,
    divisor_override=None,
):
    source = _check_nchw(input)
    y = pooling.masked_avg_pool2d(
        source.features,
        source.mask,
        *(_plain(v) for v in (kernel_size, stride or kernel_size, padding)),
        ceil_mode,
        count_include_pad,
        divisor_override,
        border=_border(input),
    )
    return source.like(y)


@_handles(F.adaptive_avg_pool2d, torch._C._nn.adaptive_avg_pool2d)
def _adaptive_avg_pool2d(func, input, output_size):
    return _adaptive(input, output_size, pooling.image_mean, pooling.masked_avg_pool2d)


@_handles(F.adaptive_max_pool2d, torch._C._nn.adaptive_max_pool2d)
def _adaptive_max_pool2d(func, input, output_size, return_indices=False):
    if return_indices:
        raise NotImplementedError(NO_INDICES)
    return _adaptive(input, output_size, pooling.image_max, pooling.masked_max_pool2d)


def _adaptive(input, output_size, reduce, pool):
    """To 1 x 1, a tensor; to another size that the blocks divide, each block by itself."""
    source = _check_nchw(input)
    size = [
        n if wanted is None else wanted for wanted, n in zip(_both(output_size), input.shape[2:])
    ]
    if size == [1, 1]:
        return reduce(source.features, source.mask)[:, :, None, None]
    kernels = {
        n // wanted if wanted and n % wanted == 0 else 0 for wanted, n in zip(size, input.shape[2:])
    }
    gh, gw = source.mask.grid
    if len(kernels) > 1 or 0 in kernels or size[0] % gh or size[1] % gw:
        raise NotImplementedError(
            f"only an output of 1 x 1, or of {gh} x {gw} blocks of 1, 2, 4, ... positions a side, "
            f"is supported, not {size[0]} x {size[1]} of {tuple(input.shape[2:])}"
        )
    (kernel,) = kernels
    return source.like(pool(source.features, source.mask, kernel))


# -- resampling -----------------------------------------------------------------------------------


@_handles(F.interpolate)
def _interpolate(
    func,
    input,
    size=None,
    scale_factor=None,
    mode="nearest",
    align_corners=None,
    recompute_scale_factor=None,
    antialias=False,
):
    source = _check_nchw(input)
    if size is None:
        times = [float(t) for t in _both(scale_factor)]
    else:
        times = [new / old for new, old in zip(_both(size), input.shape[2:])]
    if len({*times}) > 1 or not power_of_two(times[0]):
        raise NotImplementedError(
            "only a factor that is a power of two, the same in both directions, keeps the grid of "
            f"blocks, not {' x '.join(f'{t:g}' for t in times)}"
        )
    y = masked_interpolate(source.features, source.mask, times[0], mode, align_corners, antialias)
    return source.like(y)


_handles_padded(*WHY_REFUSED)(refuse)
