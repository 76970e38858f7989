"""What the ops on rows `[..., C]` share: where they run, which implementation, checks."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from convmae_kernels.ops.support.dispatch import (
    WHY_NOT_TRITON,
    Impl,
    check_impl,
    transforms_active,
)
from convmae_kernels.ops.support.dtypes import DTYPES
from convmae_kernels.recording import is_exported

if TYPE_CHECKING:
    from collections.abc import Callable


def _builds_launchers() -> bool:
    """Whether Triton finds what it builds its launchers with: a C compiler and Python's headers."""
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    headers = Path(sysconfig.get_paths(scheme=scheme)["include"], "Python.h")
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return bool(compiler) and headers.exists()


# Asked once: `torch.compile` cannot trace the question.
_TRITON_RUNS = WHY_NOT_TRITON is None and _builds_launchers()


def has_row_kernels(x: Tensor) -> bool:
    """Whether the ops on rows save bytes here: their kernels can run on the device of `x`.

    Not in exported programs, which are made of PyTorch's own ops, and not under `torch.func`.
    """
    return x.is_cuda and _TRITON_RUNS and not is_exported() and not transforms_active()


def choose(impl: Impl, name: str, reference: Callable, x: Tensor) -> Callable:
    """The callable that runs the op `name` on `x`: a registered op, or the reference.

    Raises:
        RuntimeError: `impl` was asked for by name and cannot run.
    """
    if impl in ("cpu", "cuda"):
        raise RuntimeError(
            f"impl={impl!r} cannot run: {name} has kernels in Triton only; expected 'auto', "
            "'reference' or 'triton'"
        )
    check_impl(impl, x)
    if impl == "reference" or transforms_active() or is_exported():
        return reference
    return getattr(torch.ops.convmae_triton if impl == "triton" else torch.ops.convmae, name)


def check_rows(name: str, x: Tensor) -> None:
    """`x` is a floating tensor of rows.

    Raises:
        TypeError: not a tensor, or a dtype that the kernels do not have.
        ValueError: it has no rows.
    """
    _check_floating(name, x)
    if x.dim() < 2:
        raise ValueError(f"{name} must be [..., C], of 2 dimensions or more, got {list(x.shape)}")


def check_vector(name: str, vector: Tensor, x: Tensor) -> None:
    """`vector` is a floating tensor with a number for each channel of `x`, on its device.

    Raises:
        TypeError, ValueError: it is not.
    """
    _check_floating(name, vector)
    if vector.shape != x.shape[-1:]:
        raise ValueError(f"{name} must be [{x.shape[-1]}], got {list(vector.shape)}")
    if vector.device != x.device:
        raise ValueError(f"{name} is on {vector.device}, but x is on {x.device}")


def _check_floating(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
