"""Sums, means, extremes and other reductions of `Packed`.

Over channels they give a `Packed`. Over positions they take the visible ones of each image, and
over positions and images all visible ones: both give plain tensors. Of an image without visible
positions every reduction is 0.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from convmae_kernels.functional import norm, pooling
from convmae_kernels.packed.axes import channel, places, without
from convmae_kernels.packed.map_like import handles, read_variance
from convmae_kernels.packed.packed import HANDLERS, Packed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from convmae_kernels.block_mask import BlockMask

_handles = partial(handles, HANDLERS)


class Reduction(NamedTuple):
    """How something is reduced.

    Attributes:
        of_dims: `(tensor, dims, keepdim)`: that of a plain tensor.
        of_images: `(features [T, s*s, *channels], mask, dims)`: of the visible positions of each
            image and of dimensions of channels, which are kept with size 1: `[B, *channels]`.
    """

    of_dims: Callable
    of_images: Callable


def reduced(x: Packed, how: Reduction, dim: Any, keepdim: bool, dtype: Any = None) -> Any:
    """`x` reduced over `dim`, as PyTorch's functions do."""
    features = x.features if dtype is None else x.features.to(dtype)
    dims = places(x.axes, dim)
    letters = {x.axes[at] for at in dims}
    channels = [2 + channel(x.axes, at) for at in dims if x.axes[at] == "C"]
    if letters == {"C"}:
        y = how.of_dims(features, channels, keepdim)
        return x.like(y, x.axes if keepdim else without(x.axes, dims))
    if not ("N" in letters or {"H", "W"} <= letters):
        raise NotImplementedError(
            "it reduces channels, or all positions of an image (rows and columns together), or of "
            f"all images, got dim={dim} of {x.axes}"
        )
    if "B" in letters:
        every = [0, 1, *channels]
        y = how.of_dims(features, every, True) if features.numel() else _zeros(features, every)
        y = y.squeeze(1)
    else:
        y = how.of_images(features, x.mask, channels)
    return _arranged(y, x.axes, dims, keepdim)


def _zeros(features: Tensor, dims: Sequence[int]) -> Tensor:
    """Of nothing: zeros, of which gradients may be asked."""
    return features.sum(tuple(dims), keepdim=True)


def _arranged(y: Tensor, axes: str, dims: Sequence[int], keepdim: bool) -> Tensor:
    """`[B, *channels]`, of which 1 is left of what was reduced, in the order of the axes."""
    channels = iter(range(1, y.dim()))
    order = [next(channels) if x == "C" else 0 for x in axes if x in "BC"]
    y = y.permute(order)
    for at, letter in enumerate(axes):
        y = y.unsqueeze(at) if letter not in "BC" else y
    return y if keepdim else y.squeeze(tuple(dims))


# -- over the visible positions of each image -----------------------------------------------------


def _by_channel(reduce: Callable, rest: Callable) -> Callable:
    """`reduce` of positions for each channel, then `rest` of channels."""

    def of_images(features: Tensor, mask: BlockMask, dims: Sequence[int]) -> Tensor:
        channels = features.shape[2:]
        rows = features.reshape(*features.shape[:2], channels.numel())
        y = reduce(rows, mask).reshape(mask.batch_size, *channels)
        return rest(y, [dim - 1 for dim in dims], True) if dims else y

    return of_images


def _image_sum(x: Tensor, mask: BlockMask) -> Tensor:
    return pooling.image_sum(x, mask).to(x.dtype)


def _image_min(x: Tensor, mask: BlockMask) -> Tensor:
    return -pooling.image_max(-x, mask)


def _sum(x: Tensor, dims: Sequence[int], keepdim: bool) -> Tensor:
    return x.sum(tuple(dims), keepdim)


_MEAN_OF_IMAGES = _by_channel(pooling.image_mean, torch.mean)
_SUM_OF_IMAGES = _by_channel(_image_sum, _sum)
_MAX_OF_IMAGES = _by_channel(pooling.image_max, torch.amax)


def _spread(values: Tensor, mask: BlockMask) -> Tensor:
    """`[B, *channels] -> [T, 1, *channels]`."""
    return pooling.spread_to_blocks(values.unsqueeze(1), mask)


def _counts(features: Tensor, mask: BlockMask, dims: Sequence[int]) -> Tensor:
    """How many values of each image are reduced to one: `[B, 1, ...]`."""
    values = features.shape[1]  # of a block
    for dim in dims:
        values *= features.shape[dim]
    counts = pooling.image_counts(mask, 1) * values
    return counts.view(-1, *(1,) * (features.dim() - 2))


def _variance_of_images(
    features: Tensor, mask: BlockMask, dims: Sequence[int], correction: float
) -> Tensor:
    centred = features - _spread(_MEAN_OF_IMAGES(features, mask, dims), mask)
    squares = _SUM_OF_IMAGES(centred.square(), mask, dims)
    counts = _counts(features, mask, dims)
    return squares / torch.where(counts > 0, (counts - correction).clamp_min(0), 1)


def _logsumexp_of_images(features: Tensor, mask: BlockMask, dims: Sequence[int]) -> Tensor:
    highest = _MAX_OF_IMAGES(features.detach(), mask, dims)
    total = _SUM_OF_IMAGES((features - _spread(highest, mask)).exp(), mask, dims)
    return torch.where(total > 0, torch.where(total > 0, total, 1).log() + highest, 0)


def _logsumexp(x: Tensor, dims: Sequence[int], keepdim: bool) -> Tensor:
    return torch.logsumexp(x, tuple(dims), keepdim)


MEAN = Reduction(torch.mean, _MEAN_OF_IMAGES)
SUM = Reduction(_sum, _SUM_OF_IMAGES)
AMAX = Reduction(torch.amax, _MAX_OF_IMAGES)
AMIN = Reduction(torch.amin, _by_channel(_image_min, torch.amin))
LOGSUMEXP = Reduction(_logsumexp, _logsumexp_of_images)


def _variance(correction: float) -> Reduction:
    return Reduction(
        lambda x, dims, keepdim: x.var(tuple(dims), correction=correction, keepdim=keepdim),
        partial(_variance_of_images, correction=correction),
    )


def _deviation(correction: float) -> Reduction:
    def of_images(features: Tensor, mask: BlockMask, dims: Sequence[int]) -> Tensor:
        some = _counts(features, mask, dims) > 0
        variance = _variance_of_images(features, mask, dims, correction)
        return torch.where(some, torch.where(some, variance, 1).sqrt(), 0)

    return Reduction(
        lambda x, dims, keepdim: x.std(tuple(dims), correction=correction, keepdim=keepdim),
        of_images,
    )


def _norm(p: Any) -> Reduction:
    """Of the vectors along the reduced dimensions; its gradient is 0 where it is 0."""
    p = 2.0 if p in (None, "fro") else float(p)

    def of_dims(x: Tensor, dims: Sequence[int], keepdim: bool) -> Tensor:
        return torch.linalg.vector_norm(x, p, tuple(dims), keepdim)

    if p == float("inf"):
        return Reduction(of_dims, lambda x, mask, dims: _MAX_OF_IMAGES(x.abs(), mask, dims))
    if p == 1:
        return Reduction(of_dims, lambda x, mask, dims: _SUM_OF_IMAGES(x.abs(), mask, dims))
    if p == 2:
        return Reduction(of_dims, _by_channel(norm.image_norm, of_dims))
    if p <= 0:
        raise NotImplementedError(f"only a norm of positive p is supported, got p={p}")

    def of_images(x: Tensor, mask: BlockMask, dims: Sequence[int]) -> Tensor:
        total = _SUM_OF_IMAGES(x.abs().pow(p), mask, dims)
        some = total > 0
        return torch.where(some, torch.where(some, total, 1).pow(1 / p), 0)

    return Reduction(of_dims, of_images)


# -- handlers -------------------------------------------------------------------------------------


def _handler(how: Reduction) -> Callable:
    def reduce(func, input, dim=None, keepdim=False, *, dtype=None):
        return reduced(input, how, dim, keepdim, dtype)

    return reduce


for _name, _how in (
    *(("mean", MEAN), ("sum", SUM), ("amax", AMAX)),
    *(("amin", AMIN), ("logsumexp", LOGSUMEXP)),
):
    _handles(getattr(torch, _name), getattr(Tensor, _name))(_handler(_how))
_handles(torch.special.logsumexp)(_handler(LOGSUMEXP))


@_handles(torch.norm, Tensor.norm, torch.linalg.vector_norm)
def _vector_norm(func, input, p=2, dim=None, keepdim=False, **options):
    p = options.pop("ord", p)
    return reduced(input, _norm(p), dim, keepdim, options.get("dtype"))


@_handles(torch.var, Tensor.var)
def _var(func, input, *args, **kwargs):
    dim, correction, keepdim = read_variance(args, kwargs)
    return reduced(input, _variance(correction), dim, keepdim)


@_handles(torch.std, Tensor.std)
def _std(func, input, *args, **kwargs):
    dim, correction, keepdim = read_variance(args, kwargs)
    return reduced(input, _deviation(correction), dim, keepdim)


@_handles(torch.var_mean, torch.std_mean)
def _var_mean(func, input, *args, **kwargs):
    dim, correction, keepdim = read_variance(args, kwargs)
    how = _variance(correction) if func is torch.var_mean else _deviation(correction)
    return reduced(input, how, dim, keepdim), reduced(input, MEAN, dim, keepdim)


@_handles(torch.prod, Tensor.prod)
def _prod(func, input, dim=None, keepdim=False, *, dtype=None):
    def of_dims(x: Tensor, dims: Sequence[int], keep: bool) -> Tensor:
        for at in sorted(dims, reverse=True):
            x = torch.prod(x, at, keep)
        return x

    def of_images(x: Tensor, mask: BlockMask, dims: Sequence[int]) -> Tensor:
        raise NotImplementedError("a product is of channels only")

    return reduced(input, Reduction(of_dims, of_images), dim, keepdim, dtype)


@_handles(torch.any, Tensor.any, torch.all, Tensor.all)
def _any(func, input, dim=None, keepdim=False):
    """Of all visible values, or of channels."""
    if dim is None:
        return func(input.features)

    def of_images(x: Tensor, mask: BlockMask, dims: Sequence[int]) -> Tensor:
        raise NotImplementedError("it is of channels only, or of everything")

    return reduced(input, Reduction(func, of_images), dim, keepdim)
