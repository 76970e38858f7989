"""What PyTorch's `FlopCounterMode` counts for the ops: two FLOPs a multiply-add.

A tap counts wherever it lies, in a hidden block or outside the image too, as PyTorch's formula
counts those in the padding: of a mask that shows everything the count is that of the dense network.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from importlib.abc import MetaPathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

COUNTER = "torch.utils.flop_counter"

_formulas: dict[Any, Callable[..., int]] = {}


def add_flop_formula(op: Any, formula: Callable[..., int]) -> None:
    """Lets `FlopCounterMode` count an op.

    Its module imports Triton, which takes long. So it is not imported for this: the formula waits
    until somebody imports it.

    Args:
        op: such as `torch.ops.convmae.masked_conv2d`.
        formula: takes the op's arguments, each tensor as its shape, and `out_shape`.
    """
    if COUNTER in sys.modules:
        sys.modules[COUNTER].register_flop_formula(op)(formula)
    else:
        _formulas[op] = formula


class _CounterFinder(MetaPathFinder):
    """Finds the counter's module as Python does, and adds the formulas once it is executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_add(module: ModuleType) -> None:
                execute(module)
                for op, formula in _formulas.items():
                    module.register_flop_formula(op)(formula)

            spec.loader.exec_module = execute_and_add  # type: ignore[method-assign]
        return spec


if COUNTER not in sys.modules:
    sys.meta_path.insert(0, _CounterFinder())


# -- formulas -------------------------------------------------------------------------------------


def depthwise_flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """Of `masked_conv2d`: every tap of every position."""
    return 2 * math.prod(x) * math.prod(weight[2:])


def weight_gradient_flops(
    grad: Sequence[int],
    x: Sequence[int],
    neighbours: Any,
    kernel: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    """Of `masked_conv2d_weight_grad`: as many as forward."""
    return 2 * math.prod(x) * math.prod(kernel)


def both_gradients_flops(
    grad: Sequence[int], x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any
) -> int:
    """Of `masked_conv2d_grads`: twice as many as forward."""
    return 2 * depthwise_flops(x, weight)


def window_flops(
    x: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any
) -> int:
    """Of `window_conv2d`: every tap of every input channel of a group, for every output."""
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def grouped_input_flops(grad: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """Of `grouped_conv2d_input_grad`: as many as forward."""
    return 2 * math.prod(grad) * math.prod(weight[1:])


def grouped_weight_flops(
    grad: Sequence[int], *_: Any, out_shape: Sequence[Sequence[int]], **__: Any
) -> int:
    """Of `grouped_conv2d_weight_grad`: as many as forward."""
    return 2 * math.prod(grad) * math.prod(out_shape[0][1:])
