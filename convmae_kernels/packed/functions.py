"""What the functions and methods of PyTorch do with `Packed`; fills the table `HANDLERS`.

A handler is called with the function and its arguments. `_` parameters are of no consequence here.
The errors that it raises say why; `Packed` adds which operation of which module it was.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convmae_kernels.functional import norm, pooling
from convmae_kernels.ops.support.arithmetic import multiply
from convmae_kernels.packed.map_like import ELEMENTWISE, OPERATORS, handles
from convmae_kernels.packed.packed import HANDLERS, Packed, broadcast, first_packed

if TYPE_CHECKING:
    from collections.abc import Callable

    from convmae_kernels.block_mask import BlockMask


_handles = partial(handles, HANDLERS)


def _elementwise(func: Callable, *args: Any, **kwargs: Any) -> Packed:
    first = first_packed([*args, *kwargs.values()])
    if func in IN_PLACE and not isinstance(args[0], Packed):
        # Not a TypeError: Python would call the operator that is not in place instead.
        raise ValueError("packed features cannot be written into a tensor")
    arguments = [broadcast(value, first) for value in args]
    options = {key: broadcast(value, first) for key, value in kwargs.items()}
    if options.get("memory_format") is not None:
        del options["memory_format"]
    if torch.channels_last in arguments:
        arguments.remove(torch.channels_last)
    features = func(*arguments, **options)
    if features.shape[:2] != first.features.shape[:2]:
        raise ValueError(f"the result does not keep the positions of {tuple(first.shape)}")
    return first.like(features)


IN_PLACE = set()
for _name in OPERATORS.split():
    _function = getattr(Tensor, f"__{_name}__")
    HANDLERS[_function] = _elementwise
    if _name[0] == "i":
        IN_PLACE.add(_function)
for _name in ELEMENTWISE.split():
    for _variant in (_name, _name + "_"):
        for _space in (torch, Tensor, F, torch._C._nn):
            _function = getattr(_space, _variant, None)
            if callable(_function):
                HANDLERS[_function] = _elementwise
                if _variant != _name:
                    IN_PLACE.add(_function)


@_handles(Tensor.to, Tensor.type, Tensor.type_as)
def _cast(func, input, *args, **kwargs):
    """The dtype or device of another tensor, whose shape is of no consequence."""
    plain = [x.features if isinstance(x, Packed) else x for x in args]
    if not isinstance(input, Packed):
        return func(input, *plain, **kwargs)
    kwargs.pop("memory_format", None)
    features = func(input.features, *plain, **kwargs)
    return input.like(features) if isinstance(features, Tensor) else features


def _nchw(x: Packed) -> None:
    if not isinstance(x, Packed) or x._channels_last:
        raise ValueError(f"it needs [B, C, H, W], got {tuple(x.shape)}")


@_handles(torch._C._nn.linear, F.linear)
def _linear(func, input, weight, bias=None):
    if not isinstance(input, Packed) or not input._channels_last:
        raise ValueError(f"it needs [B, H, W, C], got {tuple(input.shape)}")
    return input.like(multiply(F.linear, input.features, weight, bias))


# -- norms ----------------------------------------------------------------------------------------


@_handles(F.batch_norm)
def _batch_norm(
    func,
    input,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
):
    _nchw(input)
    y = norm.masked_batch_norm(
        input.features, input.mask, running_mean, running_var, weight, bias, training, momentum, eps
    )
    return input.like(y)


@_handles(torch.layer_norm, F.layer_norm)
def _layer_norm(func, input, normalized_shape, weight=None, bias=None, eps=1e-5, *_):
    if not input._channels_last or tuple(normalized_shape) != (input.features.shape[2],):
        raise ValueError(
            f"it needs [B, H, W, C] and a norm over C, got {tuple(input.shape)} and a norm over "
            f"{tuple(normalized_shape)}"
        )
    return input.like(F.layer_norm(input.features, normalized_shape, weight, bias, eps))


@_handles(torch.group_norm, F.group_norm)
def _group_norm(func, input, num_groups, weight=None, bias=None, eps=1e-5, *_):
    _nchw(input)
    y = norm.masked_group_norm(input.features, input.mask, num_groups, weight, bias, eps)
    return input.like(y)


# -- sums over positions --------------------------------------------------------------------------


def _reduction(over_positions: Callable, over_channels: Callable) -> Callable:
    """Of all visible positions, of those of each image, or of the channels of each position."""

    def reduce(func, input, dim=None, keepdim=False, *, dtype=None):
        x = input.features if dtype is None else input.features.to(dtype)
        if dim is None:
            return over_channels(x.flatten(), 0, False) if x.numel() else x.sum()  # 0 of nothing
        dims = {d % 4 for d in _both_dims(dim)}
        positions = {1, 2} if input._channels_last else {2, 3}
        channels = ({1, 2, 3} - positions).pop()
        if dims == positions:
            y = over_positions(x, input.mask)
            return (
                y[:, None, None]
                if keepdim and input._channels_last
                else (y[:, :, None, None] if keepdim else y)
            )
        if dims == {channels} and keepdim:
            return input.like(over_channels(x, 2, True))
        raise NotImplementedError(
            f"it reduces positions, or channels with keepdim=True, not dim={dim}"
        )

    return reduce


def _both_dims(dim: Any) -> tuple[int, ...]:
    return (dim,) if isinstance(dim, int) else tuple(dim)


def _sum(x: Tensor, mask: BlockMask) -> Tensor:
    return pooling.image_sum(x, mask).to(x.dtype)


for _name, _reduce in (
    ("mean", _reduction(pooling.image_mean, torch.mean)),
    ("sum", _reduction(_sum, torch.sum)),
    ("amax", _reduction(pooling.image_max, torch.amax)),
):
    HANDLERS[getattr(torch, _name)] = HANDLERS[getattr(Tensor, _name)] = _reduce

_norm2 = _reduction(norm.image_norm, lambda x, dim, keep: x.norm(2, dim, keep))


@_handles(torch.norm, Tensor.norm, torch.linalg.vector_norm)
def _norm(func, input, p=2, dim=None, keepdim=False, **options):
    p = options.pop("ord", p)
    if p not in (2, 2.0, "fro", None):
        raise NotImplementedError(f"only p=2 is supported, got p={p}")
    return _norm2(func, input, dim, keepdim, dtype=options.get("dtype"))


# -- channels and layout --------------------------------------------------------------------------


@_handles(torch.permute, Tensor.permute)
def _permute(func, input, *dims, **named):
    dims = (*dims, *named.values())
    order = tuple(d % 4 for d in (dims[0] if len(dims) == 1 else dims))
    layouts = (
        {(0, 1, 2, 3): False, (0, 2, 3, 1): True}
        if not input._channels_last
        else {(0, 1, 2, 3): True, (0, 3, 1, 2): False}
    )
    if order not in layouts:
        raise NotImplementedError(f"only [B, C, H, W] and [B, H, W, C] are supported, not {order}")
    return Packed(input.features, input.mask, layouts[order])


@_handles(torch.cat, torch.concat, torch.concatenate)
def _cat(func, tensors, dim=0, **options):
    first = first_packed(tensors)
    _channels(first, dim)
    if not all(isinstance(x, Packed) for x in tensors):
        raise ValueError("all tensors must be Packed")
    return first.like(torch.cat([x.features for x in tensors], 2))


@_handles(torch.chunk, Tensor.chunk, torch.split, Tensor.split, torch.tensor_split)
def _chunk(func, input, sizes=None, dim=0, **named):
    sizes = next(iter(named.values()), sizes)  # each function has another name for it
    _channels(input, dim)
    return tuple(input.like(part) for part in func(input.features, sizes, 2))


def _channels(x: Packed, dim: int) -> None:
    if dim % 4 != (3 if x._channels_last else 1):
        raise NotImplementedError(f"only along channels, got dim={dim} of {tuple(x.shape)}")


def _make(func, input, *args, **kwargs):
    """A plain tensor of another shape, in the dtype and on the device of the features."""
    return func(input.features, *args, **kwargs)


for _name in ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros"):
    HANDLERS[getattr(Tensor, _name)] = _make
