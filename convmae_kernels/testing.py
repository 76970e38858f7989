"""Inputs, the implementations to run and the one error budget, for tests and benchmarks alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from convmae_kernels.block_mask import BlockMask
from convmae_kernels.ops import gather_visible, reference, scatter_visible
from convmae_kernels.ops.support.dispatch import Impl, why_not
from convmae_kernels.ops.support.dtypes import DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "DTYPES",
    "LAYOUTS",
    "MASKS",
    "assert_within_budget",
    "dense_masked_conv2d",
    "implementations",
    "make_mask",
    "oracle",
    "random_tensor",
    "value_and_grads",
    "with_layout",
]

LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed", "expanded")


def implementations(device: torch.device | str = "cpu") -> tuple[Impl, ...]:
    """Names for `impl=`: "reference" and whatever else runs on the device.

    Where nothing else does, "auto" takes its place: the registered ops and their derivative
    formulas, with the reference as their kernel.
    """
    probe = torch.zeros(0, device=device)
    names: tuple[Impl, ...] = ("cpu", "cuda", "triton")
    compiled = tuple(name for name in names if why_not(name, probe) is None)
    return ("reference", *(compiled or ("auto",)))


# -- inputs -------------------------------------------------------------------------------------


def _visible(*images: str) -> Tensor:
    """Drawn masks, rows apart by spaces (`#` visible, `.` hidden), as bool `[B, gh, gw]`."""
    return torch.tensor([[[block == "#" for block in row] for row in im.split()] for im in images])


MASKS = {
    "ragged": _visible("##.# .#.. #.##", ".... .... ....", "#### #### ####", "...# .... #..."),
    "equal": _visible("#..# .#.. ..#.", ".##. .... #.#."),
    "none": _visible(".... .... ....", ".... .... ...."),
    "one": _visible(".... ...# ...."),
    "all": _visible("#### #### ####", "#### #### ####"),
    "row": _visible("##.#.#", "......", ".#####"),
    "column": _visible("# # . # #", ". . # # ."),
    "corner": _visible("## .#"),
    "single_block": _visible("#", ".", "#"),
}
"""The edge cases that every op must get right, as `visible` tensors."""


def make_mask(name: str, device: torch.device | str = "cpu") -> BlockMask:
    """The mask `MASKS[name]`."""
    return BlockMask.from_visible(MASKS[name].to(device))


def random_tensor(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    device: torch.device | str = "cpu",
) -> Tensor:
    """Normal values in the given layout."""
    x = torch.randn(*shape, dtype=torch.float64, device=device).to(dtype)
    return with_layout(x, layout)


def with_layout(x: Tensor, layout: str) -> Tensor:
    """A copy of `x` that lies in memory in another way; "expanded" repeats the first `x[0]`.

    Args:
        x: any tensor of rank 1 or more.
        layout: one of `LAYOUTS`. "sliced" has a storage offset, gaps in every axis and NaN in them;
            "channels_last" has axis 1 contiguous, "transposed" axis 0; "expanded" has a stride 0.

    Raises:
        ValueError: no such layout.
    """
    if layout == "contiguous" or (layout == "channels_last" and x.dim() < 2):
        return x.clone(memory_format=torch.contiguous_format)
    if layout == "channels_last":
        return x.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)
    if layout == "transposed":
        return x.transpose(0, -1).clone(memory_format=torch.contiguous_format).transpose(0, -1)
    if layout == "expanded":
        return x[:1].clone().expand_as(x)
    if layout == "sliced":
        room = x.new_full([2 * size + 1 for size in x.shape], float("nan"))
        inside = room[tuple(slice(1, None, 2) for _ in x.shape)]
        return inside.copy_(x)
    raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")


# -- what to compare with -----------------------------------------------------------------------


def dense_masked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: BlockMask,
    dilation: int | tuple[int, int] = 1,
) -> Tensor:
    """`gather(F.conv2d(where(visible, scatter(x), 0)))`: `masked_conv2d` the dense way."""
    dense = scatter_visible(x, mask, impl="reference")
    dense = torch.where(mask.to_dense(dense.shape[2] // mask.grid[0]), dense, 0)
    dense = torch.nn.functional.conv2d(
        dense, weight, bias, padding="same", dilation=dilation, groups=weight.shape[0]
    )
    return gather_visible(dense, mask, impl="reference")


def oracle(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: BlockMask,
    dilation: int | tuple[int, int] = 1,
) -> Tensor:
    """The reference `masked_conv2d` of the arguments, in float64 whatever their dtype."""
    pair = [dilation, dilation] if isinstance(dilation, int) else list(dilation)
    radius = max(
        -(-d * (k // 2) // round(x.shape[1] ** 0.5)) for d, k in zip(pair, weight.shape[2:])
    )
    bias = None if bias is None else bias.double()
    return reference.masked_conv2d(x.double(), weight.double(), bias, mask.neighbours(radius), pair)


def value_and_grads(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor
) -> list[Tensor]:
    """`[function(*inputs), *vjp]`: the output and, given its gradient, that of every input."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def assert_within_budget(
    actual: Tensor, exact: Tensor, plain: Tensor, terms: Tensor, name: str = "output"
) -> None:
    """`max |actual - exact| <= 2 * max |plain - exact| + rounding`.

    A kernel may err twice as much as plain PyTorch does in the same dtype, by one rounding of the
    result, and by what the order of a sum can do: the accumulation dtype's epsilon times the sum of
    the terms' absolute values (plain PyTorch's own error can be small by luck where terms cancel).
    There is no other tolerance.

    Args:
        actual: the tensor to judge.
        exact: the same quantity in float64.
        plain: the same quantity computed by plain PyTorch operators in the dtype of `actual`.
        terms: `exact` of the absolute values of all inputs.
        name: what the tensor is, for the message.

    Raises:
        AssertionError: another dtype or shape than `plain`, or an error over the budget.
    """
    found, expected = (actual.dtype, actual.shape), (plain.dtype, plain.shape)
    if found != expected:
        raise AssertionError(f"{name} is {found}, expected {expected}")
    if actual.numel() == 0:
        return
    error = (actual.double() - exact).abs().max().item()
    plain_error = (plain.double() - exact).abs().max().item()
    eps = torch.finfo(actual.dtype).eps
    accumulation_eps = min(eps, torch.finfo(torch.float32).eps)
    rounding = eps * exact.abs().max().item() + accumulation_eps * terms.abs().max().item()
    # Written so that a NaN fails.
    if not error <= 2 * plain_error + rounding:
        raise AssertionError(
            f"{name} errs by {error:.3g}, more than twice plain PyTorch's {plain_error:.3g} "
            f"and a rounding of {rounding:.3g}"
        )
