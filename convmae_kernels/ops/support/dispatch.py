"""The op libraries: where ops are defined and registered, and which kernels serve them.

Every op is there twice, with the same schema, fake and derivative formulas: in `convmae` the
dispatcher takes the best kernel of a device, in `convmae_triton` it is always Triton's, in the
derivatives too.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from convmae_kernels.ops.support.choices import Sizes, find
from convmae_kernels.ops.support.flops import add_flop_formula

if TYPE_CHECKING:
    from collections.abc import Callable

    from convmae_kernels.block_mask import BlockMask

Impl = Literal["auto", "reference", "cpu", "cuda", "triton"]

LIB = torch.library.Library("convmae", "DEF")
TRITON_LIB = torch.library.Library("convmae_triton", "DEF")

LIBRARY_FILE = Path(__file__).resolve().parents[2] / "_C.so"


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
# How the CUDA kernels are chosen, see csrc/explain.cpp; no GPU is needed to ask.
LIB.define("kernel_names(str op) -> str")
LIB.define("clear_kernel_choices() -> int")
LIB.define(
    "set_kernel_choice(str op, str dtype, int side, int[] kernel, int least_channels,"
    " int most_channels, bool wide, str name) -> int"
)
LIB.define(
    "explain_kernel(str op, str dtype, int blocks, int channels, int side, int[] kernel,"
    " int[] dilation, int address, int device, int multiprocessors, int shared_bytes) -> str"
)

WHY_NOT_COMPILED = load_extension()
# "8.0, 9.0+PTX": the GPUs that the compiled library has code for; "" without CUDA kernels.
CUDA_ARCHITECTURES = torch.ops.convmae.cuda_architectures() if WHY_NOT_COMPILED is None else ""
if WHY_NOT_COMPILED is not None:
    warnings.warn(
        f"convmae_kernels runs its slow reference ops: {WHY_NOT_COMPILED}. For the fast ones "
        "install a C++20 compiler and install the package again.",
        RuntimeWarning,
        stacklevel=2,
    )


def _find_triton() -> str | None:
    """Why Triton's kernels cannot run anywhere, or None; does not import it."""
    try:
        found = importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):
        found = False
    if found:
        return None
    return "triton is not installed; PyTorch for GPUs brings it, or `pip install triton`"


WHY_NOT_TRITON = _find_triton()

# Ops with kernels in Triton, and with CUDA kernels in a library that was compiled with any.
TRITON_OPS: set[str] = set()
_CUDA_OPS: set[str] = {"neighbour_table"}
# Ops made of other ops, by their full names: the function that calls those.
COMPOSED: dict[str, Callable] = {}

# Ops with CUDA kernels in the compiled library, and what runs in their place on other GPUs.
_WITHOUT_CUDA_KERNELS: dict[str, Callable] = {}
# Why the compiled CUDA kernels cannot run on the GPUs that are here; "unknown" until CUDA starts.
_why_no_code: str | None = "unknown"

# Triton's own switch: its kernels then run on the CPU, slowly, one program after the other.
TRITON_INTERPRETS = os.environ.get("TRITON_INTERPRET", "").lower() in (
    "1",
    "true",
    "yes",
    "on",
    "y",
)


@functools.cache
def _import_triton_kernel(name: str) -> Callable:
    try:
        module = importlib.import_module(f"convmae_kernels.triton.{name}")
    except ImportError as error:
        raise RuntimeError(
            f"triton is installed, but cannot be imported ({error}); repair it, or use "
            "impl='reference'"
        ) from error
    return getattr(module, name)


def register(
    schema: str,
    reference: Callable | None,
    fake: Callable,
    derivatives: Callable,
    composed: Callable | None = None,
    flops: Callable[..., int] | None = None,
) -> None:
    """Defines an op in both libraries, and registers everything but the compiled kernels.

    Args:
        schema: `name(arguments) -> results`.
        reference: the op in plain PyTorch: what runs in `convmae` where there is no kernel.
        fake: its outputs without their values.
        derivatives: given the ops of a library (`torch.ops.convmae`), returns the backward
            formula, made of these ops, and the function that saves what it needs.
        composed: for an op that is made of other ops, in place of `reference`: given the ops of a
            library, returns the kernel for every device.
        flops: for an op that computes, how many FLOPs; see `add_flop_formula`.
    """
    name = schema.partition("(")[0]
    for library in (LIB, TRITON_LIB):
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        op = f"{library.ns}::{name}"
        torch.library.register_fake(op, fake, lib=library)
        backward, setup_context = derivatives(getattr(torch.ops, library.ns))
        torch.library.register_autograd(op, backward, setup_context=setup_context, lib=library)
        if flops is not None:
            add_flop_formula(getattr(getattr(torch.ops, library.ns), name), flops)
        if composed is not None:
            kernel = COMPOSED[op] = composed(getattr(torch.ops, library.ns))
            library.impl(name, _without_views(kernel), "CompositeExplicitAutograd")
    if reference is None:
        return
    LIB.impl(name, _without_views(reference), "CompositeExplicitAutograd")
    compiled_for_cuda = has_kernel(name, "CUDA")
    TRITON_OPS.add(name)
    if compiled_for_cuda:
        _CUDA_OPS.add(name)
    if WHY_NOT_TRITON is not None:
        register_without_cuda_kernels(name, _without_views(reference))
        return

    def run_triton(*arguments):
        with torch.cuda.device_of(arguments[0]):
            return _import_triton_kernel(name)(*arguments)

    TRITON_LIB.impl(name, run_triton, "CUDA")
    if TRITON_INTERPRETS:
        TRITON_LIB.impl(name, run_triton, "CPU")
    if compiled_for_cuda:
        register_without_cuda_kernels(name, run_triton)
    else:
        LIB.impl(name, run_triton, "CUDA")


def has_kernel(op: str, key: str) -> bool:
    """Whether an op of `convmae` has a kernel of its own for a dispatcher key, "CPU" or "CUDA"."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"convmae::{op}", key)


def cuda_ops() -> set[str]:
    """The ops with CUDA kernels, in this library or, if it was compiled without, in one with."""
    return _CUDA_OPS if CUDA_ARCHITECTURES else _CUDA_OPS | TRITON_OPS


def kernels_of(op: str) -> list[str]:
    """The names of the CUDA kernels of an op that has several; of others none."""
    if WHY_NOT_COMPILED is not None:
        return []
    return [name for name in torch.ops.convmae.kernel_names(op).split(",") if name]


def register_without_cuda_kernels(name: str, kernel: Callable) -> None:
    """What runs an op where the compiled library has a CUDA kernel, but no code for the GPU."""
    if _why_no_code in (None, "unknown"):
        _WITHOUT_CUDA_KERNELS[name] = kernel
    else:  # CUDA had started before this package was imported
        LIB.impl(name, kernel, "CUDA", allow_override=True)


def _without_views(kernel: Callable) -> Callable:
    """The kernel, whose outputs may be written into: else autograd refuses where they are views."""

    def run(*arguments):
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return kernel(*arguments)

    return run


def has_code(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether a library that was compiled for `architectures` runs on a GPU of this capability.

    Machine code for 8.0 runs on 8.0 to 8.9, that for 9.0a on 9.0 alone, that for 10.0f on 10.0 to
    10.9; of 8.0+PTX the driver compiles the PTX for any later GPU.

    Args:
        architectures: as in `TORCH_CUDA_ARCH_LIST`, apart by commas.
        capability: of a GPU, `(major, minor)`.
    """
    for architecture in filter(None, re.split(r"[;,\s]+", architectures)):
        found = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", architecture)
        if found is None:
            continue
        compiled, kind = (int(found[1]), int(found[2])), found[3]
        same_major = capability[0] == compiled[0]
        if capability == compiled or (kind != "a" and same_major and capability > compiled):
            return True
        if found[4] and kind == "" and capability > compiled:
            return True
    return False


def use_gpus(capabilities: dict[str, tuple[int, int] | None]) -> None:
    """Lets Triton, or else the reference, run on GPUs that the compiled library has no code for.

    That is decided for the whole process, since the dispatcher has one kernel for all its GPUs.

    Args:
        capabilities: of every GPU that the process sees, by name; None: not one of NVIDIA's.
    """
    global _why_no_code
    without = {
        name: capability
        for name, capability in capabilities.items()
        if capability is None or not has_code(CUDA_ARCHITECTURES, capability)
    }
    if not without:
        _why_no_code = None
        return
    name, capability = next(iter(without.items()))
    compiled = f"the compiled library has kernels for compute capability {CUDA_ARCHITECTURES} only"
    if capability is None:
        _why_no_code = f"{compiled}, and {name} is not a GPU of NVIDIA's"
    else:
        number = f"{capability[0]}.{capability[1]}"
        _why_no_code = (
            f"{compiled}, and {name} has {number}; install again from source with "
            f'TORCH_CUDA_ARCH_LIST="{number}"'
        )
        if len(capabilities) > len(without):
            _why_no_code += ", or hide that GPU with CUDA_VISIBLE_DEVICES"
    other = "Triton's kernels run" if WHY_NOT_TRITON is None else "the slow reference ops run"
    warnings.warn(
        f"convmae_kernels: {other} on GPUs in place of the compiled ones: {_why_no_code}.",
        RuntimeWarning,
        stacklevel=2,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that kernels are replaced
        for op, kernel in _WITHOUT_CUDA_KERNELS.items():
            LIB.impl(op, kernel, "CUDA", allow_override=True)
    _WITHOUT_CUDA_KERNELS.clear()


def _look_at_gpus() -> None:
    capabilities: dict[str, tuple[int, int] | None] = {}
    for i in range(torch.cuda.device_count()):
        name = f"cuda:{i} ({torch.cuda.get_device_name(i)})"
        capabilities[name] = None if torch.version.hip else torch.cuda.get_device_capability(i)
    use_gpus(capabilities)


if CUDA_ARCHITECTURES:
    torch.cuda._lazy_call(_look_at_gpus)  # when CUDA starts: before that GPUs must not be asked


def why_not_cuda() -> str | None:
    """Why the compiled CUDA kernels cannot run in this process; None if they can."""
    if WHY_NOT_COMPILED is not None:
        return WHY_NOT_COMPILED
    if not CUDA_ARCHITECTURES:
        return "the compiled library has no CUDA kernels: nvcc was missing, or failed, at its build"
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    if _why_no_code == "unknown":
        torch.cuda.init()
    return _why_no_code


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
        if WHY_NOT_TRITON is None and not (x.is_cuda or (TRITON_INTERPRETS and x.is_cpu)):
            return f"the tensor is on {x.device}, not on a GPU"
        return WHY_NOT_TRITON
    return "it is not one of 'auto', 'reference', 'cpu', 'cuda', 'triton'"


def check_impl(impl: Impl, x: Tensor) -> None:
    """`impl` can run on `x`, here and now.

    Raises:
        RuntimeError: it was asked for by name and cannot.
    """
    reason = why_not(impl, x)
    if reason is None and impl not in ("auto", "reference") and transforms_active():
        reason = (
            "torch.func and forward-mode differentiation need the reference; use impl='auto' or "
            "'reference'"
        )
    if reason is not None:
        raise RuntimeError(f"impl={impl!r} cannot run: {reason}")


def as_measured(impl: Impl, op: str, x: Tensor, sizes: Sizes) -> Impl:
    """`impl`; in place of "auto" what a measured table says of the problem, if that can run."""
    chosen = find(op, x, sizes) if impl == "auto" and not transforms_active() else None
    if chosen is None or why_not(cast("Impl", chosen), x) is not None:
        return impl
    return cast("Impl", chosen)


def select(
    impl: Impl,
    name: str,
    reference: Callable,
    x: Tensor,
    mask: BlockMask,
) -> Callable:
    """The callable that runs the op `name` on `x`: a registered op, or the reference.

    The reference is plain PyTorch, so "auto" takes it under `torch.func` transforms and
    forward-mode differentiation too, which registered ops do not support, and in exported programs
    where it should (`BlockMask.wants_plain_ops`).

    Raises:
        RuntimeError: `impl` was asked for by name and cannot run.
    """
    check_impl(impl, x)
    if impl == "reference" or transforms_active() or mask.wants_plain_ops():
        return reference
    return getattr(torch.ops.convmae_triton if impl == "triton" else torch.ops.convmae, name)


def transforms_active() -> bool:
    """Whether this runs under a `torch.func` transform or forward-mode differentiation."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
