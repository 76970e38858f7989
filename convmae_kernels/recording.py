"""Whether PyTorch records a program here that others will run, and what it cannot hold."""

from __future__ import annotations

import torch


def is_onnx() -> bool:
    """Whether an ONNX export records the program."""
    return torch.onnx.is_in_onnx_export()


def leaves_pytorch() -> bool:
    """Whether the program runs where our ops are unknown: an ONNX export, or `torch.jit.trace`.

    It then has to be made of PyTorch's own ops.
    """
    return is_onnx() or torch.jit.is_tracing()


def is_exported() -> bool:
    """Whether `torch.export`, an ONNX export or `torch.jit.trace` records the program."""
    return _is_exporting() or leaves_pytorch()


def is_recorded() -> bool:
    """Whether anything records the program, `torch.compile` too: values are then unknown."""
    return torch.compiler.is_compiling() or leaves_pytorch()


def _is_exporting() -> bool:
    """`torch.compiler.is_exporting()`, which torch 2.11 takes for True in all that it compiles."""
    if hasattr(torch.compiler, "_is_exporting_flag"):
        return torch.compiler._is_exporting_flag
    return torch.compiler.is_exporting()
