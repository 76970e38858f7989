"""The op library `convmae`: where schemas are defined, and which kernels serve them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

if TYPE_CHECKING:
    from collections.abc import Callable

Impl = Literal["auto", "reference", "cpu", "cuda", "triton"]

LIB = torch.library.Library("convmae", "DEF")

LIBRARY_FILE = Path(__file__).resolve().parents[1] / "_C.so"


def load_extension() -> str | None:
    """Loads the compiled kernels over the reference ones; returns why not, or None if loaded."""
    if not LIBRARY_FILE.exists():
        return "the compiled library was not built when the package was installed"
    try:
        torch.ops.load_library(str(LIBRARY_FILE))
    except OSError as error:
        return f"the compiled library could not be loaded: {error}"
    return None


LIB.define("cpu_capability() -> str")
LIB.define("cuda_architectures() -> str")

WHY_NOT_COMPILED = load_extension()
if WHY_NOT_COMPILED is not None:
    warnings.warn(
        f"convmae_kernels runs its slow reference ops: {WHY_NOT_COMPILED}. For the fast ones "
        "install a C++20 compiler and install the package again.",
        RuntimeWarning,
        stacklevel=2,
    )


def why_not_cuda() -> str | None:
    """Why the compiled CUDA kernels cannot run in this process; None if they can."""
    if WHY_NOT_COMPILED is not None:
        return WHY_NOT_COMPILED
    if not torch.ops.convmae.cuda_architectures():
        return "the compiled library has no CUDA kernels: nvcc was not found when it was built"
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    return None


def why_not(impl: Impl, x: Tensor) -> str | None:
    """Why `impl` cannot run on `x`; None if it can."""
    if impl in ("auto", "reference"):
        return None
    if impl == "cpu":
        if x.device.type != "cpu":
            return f"the tensor is on {x.device}, not on the CPU"
        return WHY_NOT_COMPILED
    if impl == "cuda":
        if x.device.type != "cuda":
            return f"the tensor is on {x.device}, not on a CUDA GPU; {why_not_cuda() or 'move it'}"
        return why_not_cuda()
    if impl == "triton":
        return "this version has no GPU kernels yet; use impl='reference' or 'auto'"
    return "it is not one of 'auto', 'reference', 'cpu', 'cuda', 'triton'"


def select(impl: Impl, op: Callable, reference: Callable, x: Tensor) -> Callable:
    """The callable that runs an op: the registered op, or its reference.

    The reference is plain PyTorch, so "auto" takes it under `torch.func` transforms and
    forward-mode differentiation too, which registered ops do not support.

    Raises:
        RuntimeError: `impl` was asked for by name and cannot run.
    """
    transforms = _transforms_active()
    reason = why_not(impl, x)
    if reason is None and transforms and impl not in ("auto", "reference"):
        reason = (
            "torch.func and forward-mode differentiation need the reference; use impl='auto' or "
            "'reference'"
        )
    if reason is not None:
        raise RuntimeError(f"impl={impl!r} cannot run: {reason}")
    return reference if impl == "reference" or transforms else op


def _transforms_active() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def autocast_is_on(device_type: str) -> bool:
    """`torch.is_autocast_enabled`, and False for devices that have no autocast."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that an op on `x` works in: autocast's where that is on, but float64 stays."""
    if x.dtype == torch.float64 or not autocast_is_on(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)
