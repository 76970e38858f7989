"""ONNX files of modules, and their outputs by onnxruntime, for the tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from torch import Tensor, nn


def export_onnx(module: nn.Module, arguments: Tensor | tuple[Tensor, ...], path: Path) -> Path:
    """Writes `path`, of any batch; skips the test where a package is missing."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    given = arguments if isinstance(arguments, tuple) else (arguments,)
    shapes = tuple({0: "batch"} for _ in given)
    torch.onnx.export(module, given, path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    return path


def check_plain(path: Path) -> Any:
    """The model, once it is certain that all its operators are ONNX's own."""
    import onnx

    proto = onnx.load(path)
    onnx.checker.check_model(proto)
    assert len(proto.graph.node) > 0 and not proto.functions
    assert {node.domain for node in proto.graph.node} <= {"", "ai.onnx"}
    return proto


def run_onnx(path: Path, *arguments: Tensor) -> list[np.ndarray]:
    """The outputs of onnxruntime on a CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, {n: a.numpy() for n, a in zip(names, arguments, strict=True)})
