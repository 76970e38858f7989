"""Products in the arithmetic that is fast on this machine, and parameters cast to it together."""

from __future__ import annotations

import platform
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear

from convmae_kernels.ops.support.autocast import autocast_dtype
from convmae_kernels.ops.support.dispatch import transforms_active
from convmae_kernels.ops.support.dtypes import HALF_DTYPES
from convmae_kernels.zorder import patch_matrix

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


def _slow_on_this_cpu() -> frozenset[torch.dtype]:
    """The half types that oneDNN does not multiply here: PyTorch then takes 3 to 50 times as long
    for a product as in float32. Known of x86 only."""
    if (
        platform.machine().lower() not in ("x86_64", "amd64")
        or not torch.backends.mkldnn.is_available()
    ):
        return frozenset()
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return frozenset(dtype for dtype, fast in supported.items() if not fast)


SLOW_ON_CPU = _slow_on_this_cpu()


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which `x` is multiplied: float32 for a half type that the CPU does not have."""
    return torch.float32 if x.device.type == "cpu" and x.dtype in SLOW_ON_CPU else x.dtype


def multiply(
    function: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """`function(x, weight, bias)`, a linear layer or a convolution, in the faster arithmetic.

    A CPU that does not multiply a half type multiplies in float32, and the result is rounded: what
    a CPU with such products does too, as it accumulates in float32.

    Args:
        function: takes its three arguments by position.
        x, weight, bias: floating tensors of one dtype, or of any under autocast.

    Returns:
        The result, in the dtype of `x` or autocast's.
    """
    dtype = autocast_dtype(x)
    weight, bias = as_cast(weight), None if bias is None else as_cast(bias)
    if dtype == torch.float64:  # autocast leaves it, but not what it is multiplied with
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    if x.device.type != "cpu" or dtype not in SLOW_ON_CPU:
        return function(x, weight, bias)
    with torch.autocast("cpu", enabled=False):
        wide = function(x.float(), weight.float(), None if bias is None else bias.float())
        return wide.to(dtype)


def patch_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`conv2d` whose stride is its kernel, on packed features: a reshape and a matrix product.

    Args:
        x: `[T, P, C_in]`, the `P` positions of each block in Z-order.
        weight: `[C_out, C_in, k, k]`; `k` a power of two, `k * k` dividing `P`.
        bias: `[C_out]` or None.

    Returns:
        `[T, P / k**2, C_out]` in the dtype of `x`, or autocast's.
    """
    blocks, positions, channels = x.shape
    group = weight.shape[2] * weight.shape[3]
    patches = x.reshape(blocks, positions // group, group * channels)
    return multiply(linear, patches, patch_matrix(as_cast(weight)), bias)


# -- parameters under autocast --------------------------------------------------------------------


class _Casts(threading.local):
    """In each thread, what stands for which parameter: `{parameter: its cast}`."""

    def __init__(self) -> None:
        self.of: dict[Tensor, Tensor] = {}


_CASTS = _Casts()


class _CastTogether(torch.autograd.Function):
    """`[p.to(dtype) for p in parameters]` of float32 parameters: one kernel casts them all, one
    all their gradients."""

    @staticmethod
    def forward(ctx, dtype, *parameters):
        ctx.set_materialize_grads(False)
        return tuple(_copy_together(parameters, dtype))

    @staticmethod
    def backward(ctx, *grads):
        if torch.is_grad_enabled():  # to be differentiated again, which copies into tensors are not
            return None, *(None if grad is None else grad.float() for grad in grads)
        copies = iter(_copy_together([g for g in grads if g is not None], torch.float32))
        return None, *(None if grad is None else next(copies) for grad in grads)


def _copy_together(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    copies = [torch.empty_like(t, dtype=dtype) for t in tensors]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return copies


@contextmanager
def cast_together(parameters: Sequence[Tensor], x: Tensor) -> Iterator[None]:
    """Within it, the ops here use casts of these parameters, made by one kernel for all of them.

    Autocast casts every parameter by a kernel of its own, and every gradient by another: on a GPU
    more launches than the work itself. The numbers are the same. Nothing happens without autocast
    to a half type, where this CPU does not multiply that type, and in compiled code, whose compiler
    joins casts with what follows them.

    Args:
        parameters: floating tensors; those that another `cast_together` around this one has cast
            already keep that cast.
        x: what they will work on; sets device and dtype.
    """
    casts = {} if torch.compiler.is_compiling() else _new_casts(parameters, x)
    if not casts:
        yield
        return
    before = _CASTS.of
    _CASTS.of = before | casts
    try:
        yield
    finally:
        _CASTS.of = before


def _new_casts(parameters: Sequence[Tensor], x: Tensor) -> dict[Tensor, Tensor]:
    dtype = autocast_dtype(x)
    slow = x.device.type == "cpu" and dtype in SLOW_ON_CPU
    if dtype not in HALF_DTYPES or slow or transforms_active():
        return {}
    wide = [p for p in parameters if p.dtype == torch.float32 and p not in _CASTS.of]
    return dict(zip(wide, _CastTogether.apply(dtype, *wide))) if wide else {}


def as_cast(parameter: Tensor) -> Tensor:
    """What stands for a parameter here: its cast by `cast_together`, else the parameter itself."""
    if torch.compiler.is_compiling() or not _CASTS.of:
        return parameter
    return _CASTS.of.get(parameter, parameter)
