"""What functions of channels, and reductions, do with `MaskedDense`: PyTorch's own, of dense maps.

The axes of a result are worked out as for `Packed`; the values are those of PyTorch's function.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.linalg import vector_norm

from convmae_kernels.packed.axes import (
    place,
    places,
    read_index,
    view_groups,
    without,
)
from convmae_kernels.packed.map_like import Extreme, handles, read_variance
from convmae_kernels.packed.masked_dense import HARMLESS, MaskedDense, plain

if TYPE_CHECKING:
    from collections.abc import Callable

_handles = partial(handles, MaskedDense.handlers)

# -- views, order of dimensions -------------------------------------------------------------------


@_handles(
    *(torch.reshape, Tensor.reshape, Tensor.view, Tensor.view_as, Tensor.reshape_as),
    *(torch.flatten, Tensor.flatten, torch.unflatten, Tensor.unflatten),
)
def _reshape(func, input, *args, **kwargs):
    as_view = {Tensor.view: Tensor.reshape, Tensor.view_as: Tensor.reshape_as}
    values = as_view.get(func, func)(input.values, *map(plain, args), **kwargs)
    groups = view_groups(input.axes, input.shape, values.shape, *input.positions)
    return input.like(values, "".join(group.new for group in groups))


@_handles(torch.unsqueeze, Tensor.unsqueeze)
def _unsqueeze(func, input, dim):
    at = dim if dim >= 0 else dim + input.ndim + 1
    return input.like(input.values.unsqueeze(dim), input.axes[:at] + "C" + input.axes[at:])


@_handles(torch.squeeze, Tensor.squeeze)
def _squeeze(func, input, dim=None):
    chosen = places(input.axes, dim)
    gone = [at for at in chosen if input.axes[at] == "C" and input.shape[at] == 1]
    return input.like(input.values.squeeze(tuple(gone)), without(input.axes, gone))


@_handles(
    *(torch.permute, Tensor.permute, torch.transpose, Tensor.transpose),
    *(torch.swapaxes, Tensor.swapaxes, torch.swapdims, Tensor.swapdims),
    *(torch.movedim, Tensor.movedim, torch.moveaxis, Tensor.moveaxis),
)
def _permute(func, input, *args, **kwargs):
    numbered = torch.empty(tuple(range(2, 2 + input.ndim)), device="meta")  # sizes as names
    order = [size - 2 for size in func(numbered, *args, **kwargs).shape]
    axes = "".join(input.axes[at] for at in order)
    return input.like(func(input.values, *args, **kwargs), axes)


# -- indices, parts -------------------------------------------------------------------------------


@_handles(Tensor.__getitem__)
def _getitem(func, input, index):
    axes = read_index(input.axes, input.shape, index).axes
    return input.like(input.values[index], axes)


@_handles(Tensor.__setitem__)
def _setitem(func, input, index, value):
    input.values[plain(index)] = plain(value)


@_handles(torch.select, Tensor.select)
def _select(func, input, dim, index):
    axes = without(input.axes, [place(input.axes, dim)])
    return input.like(input.values.select(dim, index), axes)


@_handles(
    *(torch.index_select, Tensor.index_select, torch.narrow, Tensor.narrow),
    *(torch.roll, Tensor.roll, torch.repeat_interleave, Tensor.repeat_interleave),
    *(torch.flip, Tensor.flip, Tensor.repeat, torch.tile, Tensor.tile),
    *(Tensor.expand, torch.broadcast_to, Tensor.broadcast_to),
    *(torch.channel_shuffle, F.channel_shuffle, torch.native_channel_shuffle),
    *(torch.prelu, F.prelu, Tensor.prelu, torch.cumsum, Tensor.cumsum),
    *(F.glu, torch._C._nn.glu, F.local_response_norm, torch.cumprod, Tensor.cumprod),
    *(F.pixel_shuffle, torch.pixel_shuffle, F.pixel_unshuffle, torch.pixel_unshuffle),
    *(F.dropout2d, torch.feature_dropout, torch.argsort, Tensor.argsort),
)
def _same_axes(func, input, *args, **kwargs):
    return input.like(func(input.values, *args, **kwargs))


@_handles(Tensor.expand_as)
def _expand_as(func, input, other):
    return other.like(plain(input).expand_as(other.values))


@_handles(torch.cat, torch.concat, torch.concatenate)
def _cat(func, tensors, dim=0, **options):
    return tensors[0].like(torch.cat([x.values for x in tensors], options.get("axis", dim)))


@_handles(torch.stack)
def _stack(func, tensors, dim=0):
    first = tensors[0]
    at = dim if dim >= 0 else dim + first.ndim + 1
    values = torch.stack([x.values for x in tensors], dim)
    return first.like(values, first.axes[:at] + "C" + first.axes[at:])


@_handles(
    *(torch.chunk, Tensor.chunk, torch.split, Tensor.split),
    *(torch.tensor_split, Tensor.tensor_split),
    *(torch.split_with_sizes, Tensor.split_with_sizes),
)
def _chunk(func, input, *args, **kwargs):
    return tuple(input.like(part) for part in func(input.values, *args, **kwargs))


@_handles(torch.unbind, Tensor.unbind)
def _unbind(func, input, dim=0):
    axes = without(input.axes, [place(input.axes, dim)])
    return tuple(input.like(part, axes) for part in input.values.unbind(dim))


# -- functions along channels ---------------------------------------------------------------------


@_handles(
    *(torch.softmax, Tensor.softmax, F.softmax, torch.special.softmax, F.softmin),
    *(torch.log_softmax, Tensor.log_softmax, F.log_softmax, torch.special.log_softmax),
)
def _softmax(func, input, *args, **kwargs):
    dim = kwargs["dim"] if "dim" in kwargs else args[0]
    if input.axes[place(input.axes, dim)] != "N":
        return input.like(func(input.values, *args, **kwargs))
    empty = ~input.visible().any(dim, keepdim=True)  # of such images nobody sees anything
    hidden = torch.where(empty, 0, float("-inf")).to(input.dtype)
    values = torch.where(input.visible(), input.values, hidden)
    return input.like(func(values, *args, **kwargs)).cleared()


@_handles(torch.argmax, Tensor.argmax, torch.argmin, Tensor.argmin)
def _argmax(func, input, dim, keepdim=False):
    axes = input.axes if keepdim else without(input.axes, [place(input.axes, dim)])
    return input.like(func(input.values, dim, keepdim), axes)


@_handles(torch.sort, Tensor.sort, torch.topk, Tensor.topk)
def _sort(func, input, *args, **kwargs):
    return Extreme(*map(input.like, func(input.values, *args, **kwargs)))


@_handles(torch.max, Tensor.max, torch.min, Tensor.min)
def _max(func, input, dim=None, keepdim=False, **named):
    other = named.get("other", dim)
    if isinstance(other, (Tensor, MaskedDense)):
        return getattr(torch, f"{func.__name__}imum")(input, other)
    if dim is None:
        return input.amax() if func.__name__ == "max" else input.amin()
    axes = input.axes if keepdim else without(input.axes, [place(input.axes, dim)])
    return Extreme(*(input.like(x, axes) for x in func(input.values, dim, keepdim)))


@_handles(torch.cosine_similarity, F.cosine_similarity)
def _cosine_similarity(func, x1, x2, dim=1, eps=1e-8):
    first = x1 if isinstance(x1, MaskedDense) else x2
    axes = without(first.axes, [place(first.axes, dim)])
    return first.like(func(plain(x1, HARMLESS), plain(x2, HARMLESS), dim, eps), axes)


@_handles(F.normalize)
def _normalize(func, input, p=2.0, dim=1, eps=1e-12, out=None):
    """PyTorch's own, of the map without hidden values: they add nothing to a norm."""
    of_positions = any(input.axes[at] in "HWN" for at in places(input.axes, dim))
    return input.like(func(input.masked(0.0 if of_positions else HARMLESS), p, dim, eps))


@_handles(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
def _matmul(func, input, other):
    if isinstance(input, MaskedDense) and isinstance(other, MaskedDense):
        return input.masked() @ other.masked()  # a sum over positions
    first = input if isinstance(input, MaskedDense) else other
    return first.like(plain(input) @ plain(other))


# -- reductions -----------------------------------------------------------------------------------


def _of_channels(input: MaskedDense, dim: Any) -> bool:
    return all(input.axes[at] == "C" for at in places(input.axes, dim))


def _channelwise(input: MaskedDense, dim: Any, keepdim: bool, reduce: Callable) -> MaskedDense:
    """A function of dimensions of channels."""
    y = reduce(input.masked(HARMLESS))
    axes = input.axes if keepdim else without(input.axes, places(input.axes, dim))
    return input.like(y, axes)


def _seen(input: MaskedDense, dims: list[int], keepdim: bool) -> Tensor:
    """How many visible values are reduced to one."""
    return input.visible().expand_as(input.values).sum(tuple(dims), keepdim)


@_handles(torch.mean, Tensor.mean)
def _mean(func, input, dim=None, keepdim=False, *, dtype=None):
    input = input if dtype is None else input.to(dtype)
    if _of_channels(input, dim):
        return _channelwise(input, dim, keepdim, lambda x: x.mean(dim, keepdim))
    dims = places(input.axes, dim)
    number = _seen(input, dims, keepdim)
    return input.masked().sum(tuple(dims), keepdim) / number.clamp_min(1)


@_handles(torch.sum, Tensor.sum)
def _sum(func, input, dim=None, keepdim=False, *, dtype=None):
    input = input if dtype is None else input.to(dtype)
    if _of_channels(input, dim):
        return _channelwise(input, dim, keepdim, lambda x: x.sum(dim, keepdim))
    return input.masked().sum(tuple(places(input.axes, dim)), keepdim)


@_handles(torch.amax, Tensor.amax, torch.amin, Tensor.amin)
def _amax(func, input, dim=None, keepdim=False):
    dims = places(input.axes, dim)
    if _of_channels(input, dim):
        return _channelwise(input, dim, keepdim, lambda x: func(x, dims, keepdim))
    lowest = float("-inf") if func.__name__ == "amax" else float("inf")
    extreme = func(input.masked(lowest), dim=dims, keepdim=keepdim)
    return torch.where(_seen(input, dims, keepdim) > 0, extreme, 0)


@_handles(torch.logsumexp, Tensor.logsumexp, torch.special.logsumexp)
def _logsumexp(func, input, dim, keepdim=False):
    if _of_channels(input, dim):
        return _channelwise(input, dim, keepdim, lambda x: x.logsumexp(dim, keepdim))
    dims = places(input.axes, dim)
    empty = _seen(input, dims, True) == 0
    values = torch.where(input.visible() | empty, input.values, float("-inf"))
    y = torch.logsumexp(values, tuple(dims), keepdim)
    return torch.where(_seen(input, dims, keepdim) > 0, y, 0)


@_handles(torch.norm, Tensor.norm, torch.linalg.vector_norm)
def _norm(func, input, p=2, dim=None, keepdim=False, **options):
    p = options.pop("ord", p)
    p = 2.0 if p in (None, "fro") else float(p)
    if _of_channels(input, dim):
        return _channelwise(
            input, dim, keepdim, lambda x: vector_norm(x, p, dim, keepdim, **options)
        )
    dims = tuple(places(input.axes, dim))
    return vector_norm(input.masked(), p, dims, keepdim, **options)


def _variance(input: MaskedDense, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Variance and mean."""
    dim, correction, keepdim = read_variance(args, kwargs)
    dims = places(input.axes, dim)
    mean = input.mean(dims, keepdim=keepdim)
    if _of_channels(input, dim):
        options = {"correction": correction, "keepdim": keepdim}
        return _channelwise(input, dims, keepdim, lambda x: x.var(dims, **options)), mean
    centred = torch.where(input.visible(), input.values - input.mean(dims, keepdim=True), 0)
    number = _seen(input, dims, keepdim)
    divisor = torch.where(number > 0, (number - correction).clamp_min(0), 1)
    return centred.square().sum(tuple(dims), keepdim) / divisor, mean


def _root(variance: Any) -> Any:
    """Of a plain tensor without the infinite gradient at 0, where an image has no positions."""
    if isinstance(variance, MaskedDense):
        return variance.sqrt()
    some = variance != 0
    return torch.where(some, torch.where(some, variance, 1).sqrt(), 0)


@_handles(torch.var, Tensor.var)
def _var(func, input, *args, **kwargs):
    return _variance(input, args, kwargs)[0]


@_handles(torch.std, Tensor.std)
def _std(func, input, *args, **kwargs):
    return _root(_variance(input, args, kwargs)[0])


@_handles(torch.var_mean, torch.std_mean)
def _var_mean(func, input, *args, **kwargs):
    variance, mean = _variance(input, args, kwargs)
    return (variance if func is torch.var_mean else _root(variance)), mean


@_handles(torch.prod, Tensor.prod)
def _prod(func, input, dim, keepdim=False, *, dtype=None):
    return _channelwise(input, dim, keepdim, lambda x: x.prod(dim, keepdim, dtype=dtype))


@_handles(torch.any, Tensor.any, torch.all, Tensor.all)
def _any(func, input, dim=None, keepdim=False):
    if dim is None:
        return func(input.values[input.visible().expand_as(input.values)])
    axes = input.axes if keepdim else without(input.axes, places(input.axes, dim))
    return input.like(func(input.values, dim, keepdim), axes)
