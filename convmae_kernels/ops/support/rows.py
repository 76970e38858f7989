"""What the ops on rows `[..., C]` share: where they run, which implementation, checks."""

from __future__ import annotations

import os
import shutil
import sysconfig
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from convmae_kernels.ops.support.dispatch import (
    LIB,
    TRITON_LIB,
    WHY_NOT_TRITON,
    Impl,
    check_impl,
    transforms_active,
)
from convmae_kernels.ops.support.dtypes import DTYPES
from convmae_kernels.recording import is_exported

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def _builds_launchers() -> bool:
    """Whether Triton finds what it builds its launchers with: a C compiler and Python's headers."""
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    headers = Path(sysconfig.get_paths(scheme=scheme)["include"], "Python.h")
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return bool(compiler) and headers.exists()


# Asked once: `torch.compile` cannot trace the question.
_TRITON_RUNS = WHY_NOT_TRITON is None and _builds_launchers()
_wanted = False


@contextmanager
def joining_rows() -> Iterator[None]:
    """Inside, models run the ops on rows where they can.

    For steps that wait for the GPU, such as those captured in a CUDA graph. A launch of Triton's
    takes the host longer than one of PyTorch's own, so that a step which waits for its launches
    would become slower.
    """
    global _wanted
    before, _wanted = _wanted, True
    try:
        yield
    finally:
        _wanted = before


def has_row_kernels(x: Tensor) -> bool:
    """Whether models run the ops on rows here: that is wanted, and the device of `x` has kernels.

    Not in exported programs, which are made of PyTorch's own ops, and not under `torch.func`.
    """
    if not _wanted or not x.is_cuda or not _TRITON_RUNS:
        return False
    return not is_exported() and not transforms_active()


def choose(
    impl: Impl, name: str, reference: Callable, eager: dict[str, Callable], x: Tensor
) -> Callable:
    """The callable that runs the op `name` on `x`: a registered op, or the reference.

    Args:
        impl: as the public functions take it.
        name: of the op.
        reference: the op in PyTorch's own ops.
        eager: what runs the op where nothing is compiled, from `eager_calls`.
        x: the rows.

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
    library = TRITON_LIB.ns if impl == "triton" else LIB.ns
    if torch.compiler.is_compiling():
        return getattr(getattr(torch.ops, library), name)
    return eager[library]


def eager_calls(name: str, derivatives: Callable) -> dict[str, Callable]:
    """What runs an op, by the name of the library: the same as the op, with less work of the host.

    PyTorch runs registered derivatives through much Python, also where nothing is differentiated.

    Args:
        name: of the op.
        derivatives: what `register` was given.
    """
    return {library.ns: _eager_call(library.ns, name, derivatives) for library in (LIB, TRITON_LIB)}


def _eager_call(library: str, name: str, derivatives: Callable) -> Callable:
    ops = _Ops(library)
    formula, setup_context = derivatives(ops)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = getattr(ops, name)(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            return formula(ctx, *grads)

    return Eager.apply


class _Ops:
    """The ops of a library; without their own derivatives where nothing is differentiated."""

    def __init__(self, library: str) -> None:
        self._library = getattr(torch.ops, library)

    def __getattr__(self, name: str) -> Callable:
        op = getattr(self._library, name).default

        def run(*arguments: Any) -> Any:
            if torch.is_grad_enabled():
                return op(*arguments)
            with torch._C._AutoDispatchBelowAutograd():
                return op(*arguments)

        setattr(self, name, run)
        return run


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
