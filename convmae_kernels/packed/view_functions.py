"""Views of `Packed`, and the order of their dimensions; positions that become channels, and back.

A handler is called with the function and its arguments, as in `functions`. Dimensions of channels
are those of the features `[T, s*s, *channels]`: dimension `2 + channel(axes, dim)`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from convmae_kernels.packed.axes import (
    channel,
    place,
    places,
    view_groups,
    view_sizes,
    without,
)
from convmae_kernels.packed.map_like import handles
from convmae_kernels.packed.packed import HANDLERS, Packed
from convmae_kernels.zorder import block_side, from_zorder, to_zorder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convmae_kernels.packed.axes import Group

_handles = partial(handles, HANDLERS)


def feature_dim(x: Packed, dim: int) -> int:
    """The dimension of the features that a dimension of channels is."""
    return 2 + channel(x.axes, dim)


def sizes_of(arguments: Sequence[Any], named: dict[str, Any]) -> list[int]:
    """The numbers of `f(1, 2)`, `f((1, 2))` and `f(size=(1, 2))`."""
    chosen = (*arguments, *named.values())
    return list(chosen[0] if len(chosen) == 1 and not isinstance(chosen[0], int) else chosen)


# -- views ----------------------------------------------------------------------------------------


@_handles(torch.reshape, Tensor.reshape, Tensor.view)
def _reshape(func, input, *shape, **named):
    if shape and isinstance(shape[0], torch.dtype):
        raise NotImplementedError("a view of another dtype is none of the same channels")
    return _viewed(input, sizes_of(shape, named))


@_handles(Tensor.view_as, Tensor.reshape_as)
def _view_as(func, input, other):
    return _viewed(input, other.shape)


@_handles(torch.flatten, Tensor.flatten)
def _flatten(func, input, start_dim=0, end_dim=-1):
    first, last = place(input.axes, start_dim), place(input.axes, end_dim)
    shape = input.shape
    middle = shape[first : last + 1].numel()
    return _viewed(input, [*shape[:first], middle, *shape[last + 1 :]])


@_handles(torch.unflatten, Tensor.unflatten)
def _unflatten(func, input, dim, sizes):
    at, shape = place(input.axes, dim), input.shape
    parts = view_sizes([shape[at]], sizes)
    return _viewed(input, [*shape[:at], *parts, *shape[at + 1 :]])


@_handles(torch.unsqueeze, Tensor.unsqueeze)
def _unsqueeze(func, input, dim):
    at = dim if dim >= 0 else dim + input.ndim + 1
    if not 0 <= at <= input.ndim:
        raise ValueError(f"dim={dim} of a map of {input.ndim} dimensions")
    axes = input.axes[:at] + "C" + input.axes[at:]
    return input.like(input.features.unsqueeze(2 + axes[:at].count("C")), axes)


@_handles(torch.squeeze, Tensor.squeeze)
def _squeeze(func, input, dim=None):
    shape = input.shape
    chosen = places(input.axes, dim)
    gone = [at for at in chosen if input.axes[at] == "C" and shape[at] == 1]
    if dim is not None and any(input.axes[at] != "C" and shape[at] == 1 for at in chosen):
        raise NotImplementedError("only channels are squeezed, images and positions stay")
    features = input.features.squeeze(tuple(2 + channel(input.axes, at) for at in gone))
    return input.like(features, without(input.axes, gone)) if gone else input


def _viewed(x: Packed, sizes: Sequence[int]) -> Packed:
    """`x.reshape(sizes)`."""
    sizes = view_sizes(x.shape, sizes)
    groups = view_groups(x.axes, x.shape, sizes, *x.positions)
    axes = "".join(group.new for group in groups)
    features = _merged_into_positions(x.features, groups)
    kept = [
        size
        for group in groups
        for letter, size in zip(group.new, group.sizes)
        if letter == "C" and not (group.old in ("H", "W") and size != 1)
    ]
    features = features.reshape(*features.shape[:2], *kept)
    return x.like(_split_from_positions(features, groups), axes)


def _merged_into_positions(features: Tensor, groups: Sequence[Group]) -> Tensor:
    """Channels that a view joins with rows and columns become positions of the blocks."""
    before, merged = 0, {}
    for group in groups:
        joins = group.old in ("HC", "WC") and group.new in ("H", "W")
        if joins and features.shape[2 + before] != 1:
            merged[group.old[0]] = 2 + before
        before += group.old.count("C")
    if not merged:
        return features
    if set(merged) != {"H", "W"} or features.shape[merged["H"]] != features.shape[merged["W"]]:
        raise NotImplementedError("rows and columns must grow by the same factor")
    return into_positions(features, merged["H"], merged["W"])


def _split_from_positions(features: Tensor, groups: Sequence[Group]) -> Tensor:
    """Rows and columns that a view splits become dimensions of channels."""
    before, split, factors = 0, {}, set()
    for group in groups:
        if group.old in ("H", "W") and len([size for size in group.sizes if size != 1]) == 2:
            at = group.new.rindex("C")
            split[group.old] = 2 + before + group.new[:at].count("C")
            factors.add(group.sizes[at])
        before += group.new.count("C")
    if not split:
        return features
    if set(split) != {"H", "W"} or len(factors) != 1:
        raise NotImplementedError("rows and columns must be split by the same factor")
    return from_positions(features, factors.pop(), split["H"], split["W"])


def into_positions(features: Tensor, rows: int, columns: int) -> Tensor:
    """Two dimensions of k channels to k x k positions: `[T, n, ..., k, k] -> [T, n*k*k, ...]`."""
    squares = to_zorder(features.movedim((rows, columns), (-2, -1)))  # [T, n, ..., k*k]
    return squares.movedim(-1, 2).flatten(1, 2)


def from_positions(features: Tensor, factor: int, rows: int, columns: int) -> Tensor:
    """The inverse of `into_positions`."""
    block_side(factor * factor)
    if features.shape[1] % (factor * factor):
        raise NotImplementedError(
            f"{factor} x {factor} positions do not fit into blocks of {features.shape[1]} positions"
        )
    squares = features.unflatten(1, (features.shape[1] // factor**2, factor**2))
    return from_zorder(squares.movedim(2, -1)).movedim((-2, -1), (rows, columns))


# -- order of dimensions --------------------------------------------------------------------------


def permuted(x: Packed, order: Sequence[int]) -> Packed:
    """`x.permute(order)`."""
    if sorted(order) != list(range(x.ndim)):
        raise ValueError(f"{tuple(order)} is no order of the dimensions of {tuple(x.shape)}")
    channels = [2 + channel(x.axes, at) for at in order if x.axes[at] == "C"]
    axes = "".join(x.axes[at] for at in order)
    in_order = channels == sorted(channels)
    return x.like(x.features if in_order else x.features.permute(0, 1, *channels), axes)


@_handles(torch.permute, Tensor.permute)
def _permute(func, input, *dims, **named):
    return permuted(input, [place(input.axes, dim) for dim in sizes_of(dims, named)])


@_handles(
    *(torch.transpose, Tensor.transpose, torch.swapaxes, Tensor.swapaxes),
    *(torch.swapdims, Tensor.swapdims),
)
def _transpose(func, input, *dims, **named):
    first, second = (place(input.axes, dim) for dim in (*dims, *named.values()))
    order = list(range(input.ndim))
    order[first], order[second] = second, first
    return permuted(input, order)


@_handles(torch.movedim, Tensor.movedim, torch.moveaxis, Tensor.moveaxis)
def _movedim(func, input, source, destination):
    moved = places(input.axes, source)
    targets = places(input.axes, destination)
    rest = iter([at for at in range(input.ndim) if at not in moved])
    order = [moved[targets.index(at)] if at in targets else next(rest) for at in range(input.ndim)]
    return permuted(input, order)
