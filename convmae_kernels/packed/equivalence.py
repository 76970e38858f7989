"""The promise that skipping changes nothing, checked for a model: packed against dense."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from convmae_kernels.ops import gather_visible
from convmae_kernels.packed.map_like import MapLike
from convmae_kernels.packed.masked_dense import MaskedDense
from convmae_kernels.packed.packed import Packed

if TYPE_CHECKING:
    from collections.abc import Callable

    from convmae_kernels.block_mask import BlockMask


class EquivalenceError(AssertionError):
    """The packed run of a model deviates from the dense one."""


@dataclass(frozen=True)
class Equivalence:
    """What `check_equivalence` found.

    Attributes:
        outputs: the largest relative error of a module's output, of all modules.
        gradients: the same of the gradients of parameters and images.
        buffers: the same of buffers, running statistics among them.
        modules: the relative error of every module's output, in the order of execution.
    """

    outputs: float
    gradients: float
    buffers: float
    modules: dict[str, float] = field(repr=False)


def check_equivalence(
    model: nn.Module,
    images: Tensor,
    mask: BlockMask,
    *,
    dtype: torch.dtype = torch.float64,
    tolerance: float | None = None,
    seed: int = 0,
) -> Equivalence:
    """Runs a model packed, and densely with hidden positions multiplied by zero, and compares.

    Compares the output of every module at visible positions, the gradients of a random function of
    the outputs in all parameters and in the images, and all buffers afterwards. The model itself is
    not touched: copies of it run, in its mode (training or not), from the same random seed.

    Args:
        model: takes a map `[B, C, H, W]`.
        images: `[B, C, H, W]` for the model and the mask.
        mask: the visible blocks.
        dtype: in which both run.
        tolerance: the largest relative error; 1e-9 in float64 and 1e-3 in other dtypes if None.
        seed: of the random numbers of both runs.

    Returns:
        The errors, each relative to the largest magnitude of its tensor (of gradients and buffers,
        at least a thousandth of the largest of all, as some are zero but for rounding).

    Raises:
        EquivalenceError: an error exceeds the tolerance; names the first module that deviates.
        NotImplementedError: the model does something that packed features do not support.
        TypeError, ValueError: images and mask do not fit; see `gather_visible`.
    """
    if tolerance is None:
        tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    images = images.detach().to(dtype)
    packed = _Run(model, dtype, seed, None)  # first, for its errors name what is not supported
    packed_images = images.clone().requires_grad_()
    packed.run(Packed.gather(packed_images, mask))
    dense = _Run(model, dtype, seed, packed.outputs)
    dense_images = images.clone().requires_grad_()
    dense.run(MaskedDense(dense_images, mask).cleared())

    first = next((name for name, e in dense.errors.items() if not e <= tolerance), None)
    gradients = _largest(
        {**packed.gradients(), "images": packed_images.grad},
        {**dense.gradients(), "images": dense_images.grad},
        floor=1e-3,
    )
    buffers = _largest(
        dict(packed.model.named_buffers()), dict(dense.model.named_buffers()), floor=1e-3
    )
    worst = {"gradient of": gradients, "buffer": buffers}
    if first is not None:
        kind = type(packed.model.get_submodule(first.partition("#")[0])).__name__
        raise EquivalenceError(
            f"packed and dense runs differ: first in the output of module {first!r} ({kind}), by a "
            f"relative error of {dense.errors[first]:.2e}; at most {tolerance:.0e} was expected"
        )
    for what, (name, error) in worst.items():
        if not error <= tolerance:
            raise EquivalenceError(
                f"packed and dense runs differ: {what} {name!r}, by a relative error of "
                f"{error:.2e}; at most {tolerance:.0e} was expected. No module's output differs"
            )
    return Equivalence(
        max(dense.errors.values(), default=0.0), gradients[1], buffers[1], dense.errors
    )


def _error(a: Tensor, b: Tensor, scale: float) -> float:
    if a.shape != b.shape:
        return float("inf")
    if a.numel() == 0:
        return 0.0
    difference = float((a.double() - b.double()).abs().max())
    return difference / scale if scale else difference


def _magnitude(x: Tensor) -> float:
    return float(x.double().abs().max()) if x.numel() else 0.0


def _largest(found: dict, expected: dict, floor: float = 0.0) -> tuple[str, float]:
    """The name and the error of the tensor that deviates most."""
    expected = {name: x for name, x in expected.items() if x is not None}
    if missing := {name for name, x in found.items() if x is not None} ^ set(expected):
        return sorted(missing)[0], float("inf")
    least = floor * max(map(_magnitude, expected.values()), default=0.0)
    errors = {
        name: _error(found[name], x, max(_magnitude(x), least)) for name, x in expected.items()
    }
    return max(errors.items(), key=lambda item: item[1], default=("", 0.0))


class _Run:
    """One run of a copy of a model; notes what its modules give, or compares another with it."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, seed: int, other: dict | None) -> None:
        self.model = copy.deepcopy(model).to(dtype)
        self.seed = seed
        self.outputs: dict[str, list[Tensor]] = {}
        self.errors: dict[str, float] = {}
        self._other = other
        self._calls: dict[str, int] = {}
        for name, module in self.model.named_modules():
            module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Callable:
        def note(module: nn.Module, args: object, output: object) -> None:
            self._calls[name] = self._calls.get(name, 0) + 1
            key = name if self._calls[name] == 1 else f"{name}#{self._calls[name]}"
            tensors = [t.detach() for t in visible_values(output)]
            if self._other is None:
                self.outputs[key] = [t.clone() for t in tensors]
                return
            other = self._other.get(key, [])
            errors = [_error(a, b, _magnitude(b)) for a, b in zip(other, tensors)]
            same = len(tensors) == len(other)
            self.errors[key] = max(errors, default=0.0) if same else float("inf")

        return note

    def run(self, x: MapLike) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            values = visible_values(self.model(x))
            generator = torch.Generator().manual_seed(self.seed)
            loss = sum(
                (v * torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v)).sum()
                for v in values
            )
            if isinstance(loss, Tensor) and loss.requires_grad:
                loss.backward()

    def gradients(self) -> dict[str, Tensor | None]:
        return {name: p.grad for name, p in self.model.named_parameters()}


def visible_values(output: object) -> list[Tensor]:
    """The floating tensors of an output, maps as packed features."""
    leaves = pytree.tree_leaves(output, is_leaf=lambda leaf: isinstance(leaf, MapLike))
    tensors = []
    for leaf in leaves:
        if isinstance(leaf, Packed):
            tensors.append(leaf.features)
        elif isinstance(leaf, MaskedDense) and leaf.dtype.is_floating_point:
            tensors.append(gather_visible(leaf.nchw(), leaf.mask))
        elif isinstance(leaf, Tensor):
            tensors.append(leaf)
    return [x for x in tensors if x.is_floating_point()]
