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

from convmae_kernels.functional import norm
from convmae_kernels.ops.support.arithmetic import multiply
from convmae_kernels.packed.axes import NCHW
from convmae_kernels.packed.map_like import ELEMENTWISE, FACTS, LIKE, OPERATORS, handles
from convmae_kernels.packed.packed import HANDLERS, Packed, broadcast, first_packed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


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
    _function = getattr(Tensor, f"__{_name}__", None)
    if _function is None:
        continue
    HANDLERS[_function] = HANDLERS[_function.__name__] = _elementwise
    if _name[0] == "i" and _name != "invert":
        IN_PLACE.add(_function)
for _name in ELEMENTWISE.split():
    for _variant in (_name, _name + "_"):
        for _space in (torch, Tensor, F, torch._C._nn, torch.special):
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
    if not isinstance(x, Packed) or x.axes != NCHW:
        raise ValueError(f"it needs [B, C, H, W], got {tuple(x.shape)}")


@_handles(torch._C._nn.linear, F.linear)
def _linear(func, input, weight, bias=None):
    if not isinstance(input, Packed) or input.axes[-1] != "C":
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
    _channels_second(input)
    y = norm.masked_batch_norm(
        input.features, input.mask, running_mean, running_var, weight, bias, training, momentum, eps
    )
    return input.like(y)


def _channels_second(x: Packed) -> None:
    if not isinstance(x, Packed) or x.axes not in (NCHW, "BCN"):
        raise ValueError(f"it needs [B, C, H, W] or [B, C, N], got {tuple(x.shape)}")


def _last_channels(x: Packed, normalized_shape: Sequence[int]) -> None:
    shape = tuple(normalized_shape)
    if not x.axes.endswith("C" * len(shape)) or tuple(x.shape)[-len(shape) :] != shape:
        raise ValueError(
            f"it needs [B, H, W, C] and a norm over C, got {tuple(x.shape)} and a norm over {shape}"
        )


@_handles(torch.layer_norm, F.layer_norm)
def _layer_norm(func, input, normalized_shape, weight=None, bias=None, eps=1e-5, *_):
    _last_channels(input, normalized_shape)
    return input.like(F.layer_norm(input.features, normalized_shape, weight, bias, eps))


@_handles(torch.rms_norm, F.rms_norm)
def _rms_norm(func, input, normalized_shape, weight=None, eps=None):
    _last_channels(input, normalized_shape)
    return input.like(F.rms_norm(input.features, normalized_shape, weight, eps))


@_handles(torch.group_norm, F.group_norm)
def _group_norm(func, input, num_groups, weight=None, bias=None, eps=1e-5, *_):
    _channels_second(input)
    y = norm.masked_group_norm(input.features, input.mask, num_groups, weight, bias, eps)
    return input.like(y)


@_handles(torch.instance_norm, F.instance_norm)
def _instance_norm(
    func,
    input,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    use_input_stats=True,
    momentum=0.1,
    eps=1e-5,
    *_,
):
    _channels_second(input)
    y = norm.masked_instance_norm(
        input.features,
        input.mask,
        running_mean,
        running_var,
        weight,
        bias,
        use_input_stats,
        momentum,
        eps,
    )
    return input.like(y)


for _name in LIKE.split():
    HANDLERS[getattr(torch, _name)] = _elementwise


def _of_features(func, input, *args, **kwargs):
    """A fact of the features, or a plain tensor of another shape like them."""
    return func(input.features, *args, **kwargs)


for _name in FACTS.split():
    for _space in (torch, Tensor):
        if hasattr(_space, _name):
            HANDLERS[getattr(_space, _name)] = _of_features
