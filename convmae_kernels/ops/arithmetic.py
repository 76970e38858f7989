"""Products in the arithmetic that is fast on this machine."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from convmae_kernels.ops.library import autocast_dtype

if TYPE_CHECKING:
    from collections.abc import Callable


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
    if dtype == torch.float64:  # autocast leaves it, but not what it is multiplied with
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    if x.device.type != "cpu" or dtype not in SLOW_ON_CPU:
        return function(x, weight, bias)
    with torch.autocast("cpu", enabled=False):
        wide = function(x.float(), weight.float(), None if bias is None else bias.float())
        return wide.to(dtype)
