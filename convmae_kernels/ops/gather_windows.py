"""Each visible block with the positions around it: what convolutions and pooling look at."""

from __future__ import annotations

from typing import TYPE_CHECKING

from convmae_kernels.ops import reference
from convmae_kernels.ops.support import geometry
from convmae_kernels.ops.support.checks import check_packed
from convmae_kernels.ops.support.choices import Sizes
from convmae_kernels.ops.support.dispatch import Impl, as_measured, register, select
from convmae_kernels.zorder import block_side

if TYPE_CHECKING:
    from torch import Tensor

    from convmae_kernels.block_mask import BlockMask


def _fake(x, neighbours, halo, fill):
    side = block_side(x.shape[1])
    top, bottom, left, right = halo
    return x.new_empty(x.shape[0], top + side + bottom, left + side + right, x.shape[2])


def _fake_grad(grad, neighbours, halo):
    side = grad.shape[1] - halo[0] - halo[1]
    return grad.new_empty(grad.shape[0], side * side, grad.shape[3])


def _derivatives(ops):
    def setup_context(ctx, inputs, output):
        _, neighbours, ctx.halo, _ = inputs
        ctx.save_for_backward(neighbours)

    def backward(ctx, grad):
        (neighbours,) = ctx.saved_tensors
        return ops.gather_windows_grad(grad, neighbours, ctx.halo), None, None, None

    return backward, setup_context


def _derivatives_grad(ops):
    def setup_context(ctx, inputs, output):
        _, neighbours, ctx.halo = inputs
        ctx.save_for_backward(neighbours)

    def backward(ctx, grad):
        (neighbours,) = ctx.saved_tensors
        return ops.gather_windows(grad, neighbours, ctx.halo, 0.0), None, None

    return backward, setup_context


register(
    "gather_windows(Tensor x, Tensor neighbours, SymInt[4] halo, float fill) -> Tensor",
    reference.gather_windows,
    _fake,
    _derivatives,
)
register(
    "gather_windows_grad(Tensor grad, Tensor neighbours, SymInt[4] halo) -> Tensor",
    reference.gather_windows_grad,
    _fake_grad,
    _derivatives_grad,
)


def gather_windows(
    x: Tensor,
    mask: BlockMask,
    halo: tuple[int, int, int, int],
    fill: float = 0.0,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Each visible block with the positions around it: `[T, s*s, C] -> [T, rows, columns, C]`.

    What a convolution or a pooling without padding computes of a window, it computes of the block:
    the way to bring any operation over surroundings to packed features.

    Args:
        x: packed features `[T, s*s, C]`, float32, bfloat16, float16 or float64.
        mask: the mask that `x` was packed with.
        halo: positions above, below, left and right of a block that its window has too; negative
            where it leaves out some of the block.
        fill: the value of hidden positions, and of those outside the image.
        impl: which implementation runs; "auto" is the fastest that is there.

    Returns:
        `[T, top + s + bottom, left + s + right, C]`, contiguous, in raster order, in the dtype of
        `x`. Differentiable any number of times; gradients are added in a fixed order.

    Raises:
        TypeError: `x` is not a tensor of one of the dtypes, or `mask` is not a `BlockMask`.
        ValueError: shapes or devices do not fit, or `halo` leaves no window.
        RuntimeError: `impl` was named and cannot run.
    """
    side = check_packed("x", x, mask)
    try:
        top, bottom, left, right = halo
    except (TypeError, ValueError):
        raise ValueError(f"halo must be (top, bottom, left, right), got {halo!r}") from None
    halo = (top, bottom, left, right)
    if min(halo) <= -side or min(top + bottom, left + right) <= -side:
        raise ValueError(f"halo {halo} leaves no window of blocks of side {side}")
    neighbours = mask.neighbours(geometry.reach(halo, side))
    sizes = Sizes(side, x.shape[2])
    impl = as_measured(impl, "gather_windows", x, sizes)
    run = select(impl, "gather_windows", reference.gather_windows, x, mask)
    return run(x, neighbours, halo, fill)
