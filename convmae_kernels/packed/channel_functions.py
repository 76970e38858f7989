"""What functions of channels do with `Packed`: indices, parts, functions along them, modules.

A handler is called with the function and its arguments, as in `functions`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convmae_kernels.packed.axes import NCHW, place, read_index, without
from convmae_kernels.packed.map_like import Extreme, handles
from convmae_kernels.packed.packed import HANDLERS, Packed, broadcast, first_packed
from convmae_kernels.packed.view_functions import (
    feature_dim,
    from_positions,
    into_positions,
    sizes_of,
)
from convmae_kernels.zorder import block_side

if TYPE_CHECKING:
    from collections.abc import Sequence

_handles = partial(handles, HANDLERS)


# -- indices --------------------------------------------------------------------------------------


def _place_in_square(step: int, start: tuple[int, int]) -> int:
    """The place of row and column of a square of step x step positions in Z-order."""
    found, bit = 0, 0
    while step >> bit > 1:
        found |= (start[0] >> bit & 1) << (2 * bit + 1) | (start[1] >> bit & 1) << (2 * bit)
        bit += 1
    return found


def _indexed(x: Packed, index: Any) -> tuple[tuple[Any, ...], str]:
    """An index of the features, and the axes of what it gives."""
    read = read_index(x.axes, x.shape, index)
    square = read.step**2
    if x.features.shape[1] % square:
        raise NotImplementedError(
            f"a step of {read.step} does not divide the blocks of "
            f"{block_side(x.features.shape[1])} x {block_side(x.features.shape[1])} positions"
        )
    positions = slice(_place_in_square(read.step, read.start), None, square)
    return (slice(None), positions, *read.channels), read.axes


@_handles(Tensor.__getitem__)
def _getitem(func, input, index):
    entries = index if isinstance(index, tuple) else (index,)
    if not isinstance(input, Packed) or any(isinstance(entry, Packed) for entry in entries):
        raise NotImplementedError("the number of values that it chooses differs between images")
    chosen, axes = _indexed(input, index)
    return input.like(input.features[chosen], axes)


@_handles(Tensor.__setitem__)
def _setitem(func, input, index, value):
    if not isinstance(input, Packed):
        raise ValueError("packed features cannot be written into a tensor")
    if isinstance(index, Packed):  # x[x < 0] = 0
        first_packed([input, index])
        input.features[index.features.expand_as(input.features)] = value
        return
    chosen, axes = _indexed(input, index)
    target = input.like(input.features[chosen], axes)
    first_packed([target, value])
    input.features[chosen] = broadcast(value, target)


@_handles(torch.select, Tensor.select)
def _select(func, input, dim, index):
    at = place(input.axes, dim)
    features = input.features.select(feature_dim(input, dim), index)
    return input.like(features, without(input.axes, [at]))


def _along_channels(name: str, position: int, keyword: str) -> None:
    """Enters a function that keeps the dimensions, and whose `dim` may only be of channels."""

    def handler(func, input, *args, **kwargs):
        if keyword not in kwargs and len(args) <= position:
            raise NotImplementedError(f"only along channels, and {keyword} is not given")
        dim = kwargs[keyword] if keyword in kwargs else args[position]
        several = not isinstance(dim, int)
        at = tuple(feature_dim(input, d) for d in dim) if several else feature_dim(input, dim)
        if keyword in kwargs:
            kwargs[keyword] = at
        else:
            args = (*args[:position], at, *args[position + 1 :])
        return input.like(func(input.features, *args, **kwargs))

    for space in (torch, Tensor):
        HANDLERS[getattr(space, name)] = handler


_along_channels("index_select", 0, "dim")
_along_channels("narrow", 0, "dim")
_along_channels("roll", 1, "dims")
_along_channels("repeat_interleave", 1, "dim")


@_handles(torch.flip, Tensor.flip)
def _flip(func, input, *dims, **named):
    chosen = [feature_dim(input, dim) for dim in sizes_of(dims, named)]
    return input.like(input.features.flip(chosen))


@_handles(Tensor.repeat, torch.tile, Tensor.tile)
def _repeat(func, input, *sizes, **named):
    times = sizes_of(sizes, named)
    times = [1] * (input.ndim - len(times)) + times
    if len(times) > input.ndim or any(n != 1 for n, x in zip(times, input.axes) if x != "C"):
        raise NotImplementedError(f"only channels are repeated, got {tuple(times)}")
    return input.like(
        input.features.repeat(1, 1, *(n for n, x in zip(times, input.axes) if x == "C"))
    )


@_handles(Tensor.expand, torch.broadcast_to, Tensor.broadcast_to)
def _expand(func, input, *sizes, **named):
    return _expanded(input, sizes_of(sizes, named))


@_handles(Tensor.expand_as)
def _expand_as(func, input, other):
    """Of a plain tensor too: what the map's shape makes of it, at visible positions."""
    if isinstance(input, Packed):
        return _expanded(input, other.shape)
    features = broadcast(input, other)
    return other.like(features.expand(other.features.shape))


def _expanded(x: Packed, sizes: Sequence[int]) -> Packed:
    shape = x.shape
    fits = len(sizes) == x.ndim and all(
        new in (-1, old) for new, old, axis in zip(sizes, shape, x.axes) if axis != "C"
    )
    if not fits:
        raise NotImplementedError(f"only channels expand, {tuple(shape)} does not to {sizes}")
    channels = [new for new, axis in zip(sizes, x.axes) if axis == "C"]
    return x.like(x.features.expand(-1, -1, *channels))


# -- parts ----------------------------------------------------------------------------------------


@_handles(torch.cat, torch.concat, torch.concatenate)
def _cat(func, tensors, dim=0, **options):
    first = first_packed(tensors)
    at = feature_dim(first, options.get("axis", dim))
    if not all(isinstance(x, Packed) for x in tensors):
        raise ValueError("all tensors must be Packed")
    return first.like(torch.cat([x.features for x in tensors], at))


@_handles(torch.stack)
def _stack(func, tensors, dim=0):
    first = first_packed(tensors)
    if not all(isinstance(x, Packed) for x in tensors):
        raise ValueError("all tensors must be Packed")
    at = dim if dim >= 0 else dim + first.ndim + 1
    if not 0 < at <= first.ndim:
        raise NotImplementedError(f"only channels are stacked, behind the images, got dim={dim}")
    axes = first.axes[:at] + "C" + first.axes[at:]
    where = 2 + axes[:at].count("C")
    return first.like(torch.stack([x.features for x in tensors], where), axes)


@_handles(
    *(torch.chunk, Tensor.chunk, torch.split, Tensor.split),
    *(torch.tensor_split, Tensor.tensor_split),
    *(torch.split_with_sizes, Tensor.split_with_sizes),
)
def _chunk(func, input, sizes=None, dim=0, **named):
    sizes = next(iter(named.values()), sizes)  # each function has another name for it
    return tuple(input.like(part) for part in func(input.features, sizes, feature_dim(input, dim)))


@_handles(torch.unbind, Tensor.unbind)
def _unbind(func, input, dim=0):
    axes = without(input.axes, [place(input.axes, dim)])
    return tuple(input.like(part, axes) for part in input.features.unbind(feature_dim(input, dim)))


# -- functions along channels ---------------------------------------------------------------------


def _keeps_channels(func, input, *args, **kwargs):
    """Functions along one dimension of channels that keep it, like a softmax."""
    dim = kwargs.pop("dim", None)
    if dim is None:
        dim, args = (args[0], args[1:]) if args else (None, args)
    if dim is None:
        raise NotImplementedError("dim must be given")
    if input.axes[place(input.axes, dim)] == "N":
        return _softmax_of_positions(func, input, **kwargs)
    dtype = kwargs.get("dtype")
    x = input.features if dtype is None else input.features.to(dtype)
    along = _SOFT.get(func.__name__, func)
    return input.like(along(x, feature_dim(input, dim)))


_SOFT = {name: getattr(torch, name) for name in ("softmax", "log_softmax", "cumsum", "cumprod")}
_SOFT["softmin"] = lambda x, dim: torch.softmax(-x, dim)


def _softmax_of_positions(func: Any, x: Packed, dtype: torch.dtype | None = None, **_: Any) -> Any:
    """Over the visible positions of each image."""
    if func.__name__ not in ("softmax", "log_softmax", "special_softmax"):
        raise NotImplementedError("visible positions have no neighbours to go along")
    wide = x if dtype is None else x.to(dtype)
    at = wide.axes.index("N")
    shifted = wide - wide.detach().amax(at, keepdim=True)
    total = shifted.exp().sum(at, keepdim=True)
    total = torch.where(total > 0, total, 1)
    return shifted - total.log() if func.__name__ == "log_softmax" else shifted.exp() / total


_handles(
    *(torch.softmax, Tensor.softmax, F.softmax, torch.special.softmax, F.softmin),
    *(torch.log_softmax, Tensor.log_softmax, F.log_softmax, torch.special.log_softmax),
    *(torch.cumsum, Tensor.cumsum, torch.cumprod, Tensor.cumprod),
)(_keeps_channels)


@_handles(torch.argmax, Tensor.argmax, torch.argmin, Tensor.argmin)
def _argmax(func, input, dim=None, keepdim=False):
    if dim is None:
        raise NotImplementedError("dim must be given, one of channels: positions have no indices")
    indices = func(input.features, feature_dim(input, dim), keepdim)
    return input.like(
        indices, input.axes if keepdim else without(input.axes, [place(input.axes, dim)])
    )


@_handles(torch.sort, Tensor.sort, torch.topk, Tensor.topk)
def _sort(func, input, *args, **kwargs):
    args = list(args)
    at = 1 if func.__name__ == "topk" else 0
    dim = args.pop(at) if len(args) > at else kwargs.pop("dim", -1)
    values, indices = func(input.features, *args[:at], dim=feature_dim(input, dim), **kwargs)
    return Extreme(input.like(values), input.like(indices))


@_handles(torch.argsort, Tensor.argsort)
def _argsort(func, input, dim=-1, descending=False, **options):
    x = input.features
    return input.like(x.argsort(dim=feature_dim(input, dim), descending=descending, **options))


@_handles(torch.max, Tensor.max, torch.min, Tensor.min)
def _max(func, input, dim=None, keepdim=False, **named):
    other = named.get("other", dim)
    name = func.__name__
    if isinstance(other, (Tensor, Packed)):
        return getattr(torch, f"{name}imum")(input, other)
    if dim is None:
        return input.amax() if name == "max" else input.amin()
    found = func(input.features, feature_dim(input, dim), keepdim)
    axes = input.axes if keepdim else without(input.axes, [place(input.axes, dim)])
    return Extreme(input.like(found[0], axes), input.like(found[1], axes))


@_handles(F.glu, torch._C._nn.glu)
def _glu(func, input, dim=-1):
    return input.like(torch._C._nn.glu(input.features, feature_dim(input, dim)))


@_handles(torch.cosine_similarity, F.cosine_similarity)
def _cosine_similarity(func, x1, x2, dim=1, eps=1e-8):
    first = first_packed([x1, x2])
    a, b = broadcast(x1, first), broadcast(x2, first)
    features = func(a, b, feature_dim(first, dim), eps)
    return first.like(features, without(first.axes, [place(first.axes, dim)]))


@_handles(F.normalize)
def _normalize(func, input, p=2.0, dim=1, eps=1e-12, out=None):
    return input / input.norm(p, dim, keepdim=True).clamp_min(eps)


# -- modules --------------------------------------------------------------------------------------


def _needs(x: Packed, *choices: str) -> None:
    if not isinstance(x, Packed) or x.axes not in choices:
        expected = " or ".join(f"[{', '.join(axes)}]" for axes in choices)
        raise ValueError(f"it needs {expected}, got {tuple(x.shape)}")


@_handles(torch.prelu, F.prelu, Tensor.prelu)
def _prelu(func, input, weight):
    if input.axes[1] != "C" and weight.numel() != 1:
        raise ValueError(f"it needs [B, C, ...], got {tuple(input.shape)} ({input.axes})")
    if weight.numel() == 1:
        return input.like(torch.prelu(input.features, weight))
    return input.like(torch.prelu(input.features.movedim(2, 1), weight).movedim(1, 2))


@_handles(torch.channel_shuffle, F.channel_shuffle, torch.native_channel_shuffle)
def _channel_shuffle(func, input, groups):
    _needs(input, NCHW)
    if groups < 1 or input.features.shape[2] % groups:
        raise ValueError(f"groups={groups} must divide the {input.features.shape[2]} channels")
    return input.like(input.features.unflatten(2, (groups, -1)).transpose(2, 3).flatten(2))


@_handles(F.pixel_shuffle, torch.pixel_shuffle)
def _pixel_shuffle(func, input, upscale_factor):
    """Every position becomes a square of positions of its block."""
    _needs(input, NCHW)
    square = block_side(upscale_factor**2) ** 2
    if input.features.shape[2] % square:
        raise ValueError(f"{square} must divide the {input.features.shape[2]} channels")
    split = input.features.unflatten(2, (-1, upscale_factor, upscale_factor))
    return input.like(into_positions(split, 3, 4))


@_handles(F.pixel_unshuffle, torch.pixel_unshuffle)
def _pixel_unshuffle(func, input, downscale_factor):
    """Every square of positions of a block becomes one position."""
    _needs(input, NCHW)
    return input.like(from_positions(input.features, downscale_factor, 3, 4).flatten(2))


@_handles(F.dropout2d, torch.feature_dropout)
def _dropout2d(func, input, p=0.5, training=True, inplace=False):
    """One draw for each image and channel, that of a dense map."""
    _needs(input, NCHW, "BCN")
    ones = input.features.new_ones(input.mask.batch_size, *input.channels, 1, 1)
    scale = broadcast(F.dropout2d(ones, p, training), input.like(input.features, NCHW))
    if not inplace:
        return input.like(input.features * scale)
    input.features.mul_(scale)
    return input


@_handles(F.local_response_norm)
def _local_response_norm(func, input, size, alpha=1e-4, beta=0.75, k=1.0):
    _needs(input, NCHW)
    y = func(input.features.transpose(1, 2), size, alpha, beta, k)
    return input.like(y.transpose(1, 2))
