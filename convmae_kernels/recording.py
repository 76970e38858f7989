"""Whether PyTorch records a program here that others will run, and what it cannot hold."""

from __future__ import annotations

import torch


def leaves_pytorch() -> bool:
    """Whether the program runs where our ops are unknown: an ONNX export, or `torch.jit.trace`.

    It then has to be made of PyTorch's own ops.
    """
    return torch.onnx.is_in_onnx_export() or torch.jit.is_tracing()


def is_exported() -> bool:
    """Whether `torch.export`, an ONNX export or `torch.jit.trace` records the program."""
    return torch.compiler.is_exporting() or leaves_pytorch()


def is_recorded() -> bool:
    """Whether anything records the program, `torch.compile` too: values are then unknown."""
    return torch.compiler.is_compiling() or leaves_pytorch()
