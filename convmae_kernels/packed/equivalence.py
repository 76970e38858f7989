"""The promise that skipping changes nothing, checked for a model: packed against dense."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from convmae_kernels.ops import gather_visible
from convmae_kernels.packed.map_like import MapLike, run_named
from convmae_kernels.packed.masked_dense import MaskedDense
from convmae_kernels.packed.packed import Packed

if TYPE_CHECKING:
    from collections.abc import Callable

    from convmae_kernels.block_mask import BlockMask


# Two ways of computing round at every layer, while the probe's images differ once.
AMPLIFIED = 100
# A larger error is none of rounding, however ill-conditioned the network; in float64, in others.
NEVER_ROUNDING = 1e-3, 1e-2
GRADIENTS, BUFFERS = "gradients", "buffers"


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
        tolerance: the largest relative error. If None it is 1e-9 in float64 and 1e-3 in other
            dtypes. Where an error is larger than that, the packed model runs once more, on images
            with other last bits: those of `dtype`, or of the coarsest dtype in which a part of the
            model computes, as norms do that are always in float32. An error up to 100 times the
            change that this makes is rounding, unless it is above 1e-3 in float64, and 1e-2 in
            other dtypes.
        seed: of the random numbers of both runs.

    Returns:
        The errors, each relative to the largest magnitude of its tensor (of gradients and buffers,
        at least a thousandth of the largest of all, as some are zero but for rounding).

    Raises:
        EquivalenceError: an error is too large; names the first module that deviates.
        NotImplementedError: the model does something that packed features do not support.
        TypeError, ValueError: images and mask do not fit; see `gather_visible`.
    """
    images = images.detach().to(dtype)
    packed = _Run(model, dtype, seed, None)  # first, for its errors name what is not supported
    packed_images = images.clone().requires_grad_()
    packed.run(Packed.gather(packed_images, mask))
    dense = _Run(model, dtype, seed, packed.outputs)
    dense_images = images.clone().requires_grad_()
    dense.run(MaskedDense(dense_images, mask).cleared())

    errors = _errors(packed, packed_images, dense, dense_images)
    least = tolerance if tolerance is not None else 1e-9 if dtype == torch.float64 else 1e-3
    never = NEVER_ROUNDING[dtype != torch.float64]
    rounding: dict[str, float] = {}
    if tolerance is None and not all(error <= least for _, error in errors.values()):
        rounding, coarsest = _changes(model, images, mask, packed, packed_images, dtype)
        if coarsest != dtype:  # parts of the model round more than the images do
            rounding, _ = _changes(model, images, mask, packed, packed_images, coarsest)
    for what, (name, error) in errors.items():
        moved = rounding.get(what, 0.0)
        limit = max(least, min(AMPLIFIED * moved, never))
        if error <= limit:
            continue
        message = f"packed and dense runs differ: {name}, by a relative error of {error:.2e}; "
        message += f"at most {limit:.0e} was expected"
        if what in (GRADIENTS, BUFFERS):
            message += ". No module's output differs"
        if moved > never / AMPLIFIED:
            message += (
                f". Other last bits of the images change it by {moved:.0e}: on more or larger "
                "images, or in evaluation mode, rounding may matter less"
            )
        raise EquivalenceError(message)
    outputs = max(dense.errors.values(), default=0.0)
    return Equivalence(outputs, errors[GRADIENTS][1], errors[BUFFERS][1], dense.errors)


def _errors(
    run: _Run, images: Tensor, other: _Run, other_images: Tensor
) -> dict[str, tuple[str, float]]:
    """What was compared between two runs, of which `other` compared itself with `run`.

    Returns:
        For each module, in the order of execution, and then for all gradients and all buffers: what
        to call the worst of it, and its relative error.
    """
    errors: dict[str, tuple[str, float]] = {}
    for name, error in other.errors.items():
        kind = type(run.model.get_submodule(name.partition("#")[0])).__name__
        errors[f"output {name}"] = f"first in the output of module {name!r} ({kind})", error
    gradients = {**run.gradients(), "images": images.grad}
    name, error = _largest(gradients, {**other.gradients(), "images": other_images.grad}, 1e-3)
    errors[GRADIENTS] = f"gradient of {name!r}", error
    buffers = dict(run.model.named_buffers()), dict(other.model.named_buffers())
    name, error = _largest(*buffers, 1e-3)
    errors[BUFFERS] = f"buffer {name!r}", error
    return errors


class _Coarsest(TorchDispatchMode):
    """Notes the coarsest floating dtype of all that is computed."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(results):
            if isinstance(x, Tensor) and x.is_floating_point():
                self.dtype = max(self.dtype, x.dtype, key=lambda d: torch.finfo(d).eps)
        return results


def _changes(
    model: nn.Module,
    images: Tensor,
    mask: BlockMask,
    packed: _Run,
    packed_images: Tensor,
    last_bits: torch.dtype,
) -> tuple[dict[str, float], torch.dtype]:
    """How far the results of a packed run move where the images have other last bits.

    Args:
        model, images, mask: of the check; the images in the dtype of the runs.
        packed: the run, which is over.
        packed_images: its images, with their gradient.
        last_bits: the dtype whose last bits change.

    Returns:
        The changes, by what `_errors` compares; and the coarsest dtype in which the model computes.
    """
    probe = _Run(model, images.dtype, packed.seed, packed.outputs)
    probe_images = _with_other_last_bits(images, packed.seed, last_bits).requires_grad_()
    with _Coarsest(images.dtype) as coarsest:
        probe.run(Packed.gather(probe_images, mask))
    changes = _errors(packed, packed_images, probe, probe_images)
    return {what: change for what, (_, change) in changes.items()}, coarsest.dtype


def _with_other_last_bits(images: Tensor, seed: int, dtype: torch.dtype) -> Tensor:
    """The images, every value larger or smaller by a last bit of `dtype`, by chance."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randn(images.shape, generator=generator).sign().to(images)
    return images * (1 + torch.finfo(dtype).eps * signs)


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
            values = visible_values(run_named(self.model, x))
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
            tensors.append(leaf.rows())
        elif isinstance(leaf, MaskedDense) and leaf.dtype.is_floating_point:
            tensors.append(gather_visible(leaf.nchw(), leaf.mask))
        elif isinstance(leaf, Tensor):
            tensors.append(leaf)
    return [x for x in tensors if x.is_floating_point()]
