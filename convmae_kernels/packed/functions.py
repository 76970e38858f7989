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

from convmae_kernels import ops
from convmae_kernels.functional import norm, pooling
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


@_handles(torch.conv2d, F.conv2d)
def _conv2d(func, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    _nchw(input)
    y = ops.masked_conv2d(
        input.features,
        weight,
        bias,
        input.mask,
        _plain(stride),
        _plain(dilation),
        groups,
        padding=_plain(padding),
    )
    return input.like(y)


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
    _nchw(input)
    if {*_both(padding), *_both(output_padding)} != {0} or groups != 1 or {*_both(dilation)} != {1}:
        raise NotImplementedError(
            "only a kernel as large as its stride is supported, without padding, groups, dilation"
        )
    y = ops.masked_conv_transpose2d(input.features, weight, bias, input.mask, _plain(stride))
    return input.like(y)


def _both(value: Any) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _plain(value: Any) -> Any:
    """One number of a list of one, a tuple of a list of two."""
    if isinstance(value, (list, tuple)):
        return value[0] if len(value) == 1 else tuple(value)
    return value


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


# -- pooling ---------------------------------------------------------------------------------------


@_handles(torch.max_pool2d, F.max_pool2d)
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
    _nchw(input)
    _check_ceil(kernel_size, stride, padding, dilation, ceil_mode)
    if return_indices:
        raise NotImplementedError("there are no indices")
    sizes = (_plain(v) for v in (kernel_size, stride or kernel_size, padding, dilation))
    return input.like(pooling.masked_max_pool2d(input.features, input.mask, *sizes))


@_handles(torch._C._nn.avg_pool2d, F.avg_pool2d)
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
    _nchw(input)
    _check_ceil(kernel_size, stride, padding, 1, ceil_mode)
    if divisor_override is not None:
        raise NotImplementedError("the divisor is the number of visible positions")
    sizes = (_plain(v) for v in (kernel_size, stride or kernel_size, padding))
    return input.like(pooling.masked_avg_pool2d(input.features, input.mask, *sizes))


def _check_ceil(kernel, stride, padding, dilation, ceil_mode):
    """Rounding up must not make another output."""
    parts = zip(*map(_both, (kernel, stride or kernel, padding, dilation)))
    if ceil_mode and any((2 * p - d * (k - 1) - 1) % s for k, s, p, d in parts):
        raise ValueError("ceil_mode=True would make a larger map")


@_handles(F.adaptive_avg_pool2d, torch._C._nn.adaptive_avg_pool2d)
def _adaptive_avg_pool2d(func, input, output_size):
    return _to_one(input, output_size, pooling.image_mean)


@_handles(F.adaptive_max_pool2d, torch._C._nn.adaptive_max_pool2d)
def _adaptive_max_pool2d(func, input, output_size, return_indices=False):
    return _to_one(input, output_size, pooling.image_max)


def _to_one(input, output_size, reduce):
    _nchw(input)
    if {*_both(output_size)} != {1}:
        raise NotImplementedError("only an output of 1 x 1 is supported")
    return reduce(input.features, input.mask)[:, :, None, None]


# -- resolution ------------------------------------------------------------------------------------


@_handles(F.interpolate)
def _interpolate(func, input, size=None, scale_factor=None, mode="nearest", **options):
    _nchw(input)
    height = input.shape[2]
    times = scale_factor if size is None else _both(size)[0] / height
    times = _both(times) if not isinstance(times, float) else (times, times)
    whole = (
        len({*times}) == 1 and times[0] == int(times[0]) and int(times[0]) & int(times[0]) - 1 == 0
    )
    if mode != "nearest" or not whole or (size and _both(size)[1] != input.shape[3] * times[0]):
        raise NotImplementedError('only mode="nearest" by a power of two is supported')
    return input.like(input.features.repeat_interleave(int(times[0]) ** 2, dim=1))


for _name in LIKE.split():
    HANDLERS[getattr(torch, _name)] = _elementwise


def _of_features(func, input, *args, **kwargs):
    """A fact of the features, or a plain tensor of another shape like them."""
    return func(input.features, *args, **kwargs)


for _name in FACTS.split():
    for _space in (torch, Tensor):
        if hasattr(_space, _name):
            HANDLERS[getattr(_space, _name)] = _of_features
