"""Which implementations are there, and why not."""

from __future__ import annotations

import torch

from convmae_kernels.ops.support.dispatch import (
    CUDA_ARCHITECTURES,
    TRITON_INTERPRETS,
    WHY_NOT_COMPILED,
    WHY_NOT_TRITON,
    why_not_cuda,
)


def info() -> dict[str, str]:
    """What runs the ops on this machine: one entry per implementation, "yes ..." or "no: why".

    Returns:
        A dictionary with the keys `torch`, `threads`, `reference`, `cpu`, `cuda`, `triton`.
        `python -m convmae_kernels` prints it.
    """
    if WHY_NOT_COMPILED is None:
        cpu = f"yes, {torch.ops.convmae.cpu_capability()}"
    else:
        cpu = f"no: {WHY_NOT_COMPILED}"
    return {
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "reference": "yes, plain PyTorch on any device",
        "cpu": cpu,
        "cuda": _cuda(),
        "triton": _triton(),
    }


def _cuda() -> str:
    reason = why_not_cuda()
    compiled = f"compiled for compute capability {CUDA_ARCHITECTURES}"
    if reason is None:
        return f"yes, {compiled}"
    said = CUDA_ARCHITECTURES in reason  # or there are none
    return f"no: {reason}" if said else f"no: {reason} ({compiled})"


def _triton() -> str:
    if WHY_NOT_TRITON is not None:
        return f"no: {WHY_NOT_TRITON}"
    try:
        import triton
    except ImportError as error:
        return f"no: triton is installed, but cannot be imported ({error})"
    if TRITON_INTERPRETS:
        return f"yes, {triton.__version__}, interpreted on the CPU"
    if not torch.cuda.is_available():
        return f"no: triton {triton.__version__} is installed, but PyTorch finds no GPU"
    return f"yes, {triton.__version__}, on {torch.cuda.get_device_name()}"
