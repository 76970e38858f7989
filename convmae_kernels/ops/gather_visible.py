"""Dense feature maps to packed features of the visible blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from convmae_kernels.ops import reference
from convmae_kernels.ops.support.checks import check_tensor
from convmae_kernels.ops.support.choices import Sizes
from convmae_kernels.ops.support.dispatch import Impl, as_measured, register, select
from convmae_kernels.zorder import BLOCK_SIZES

if TYPE_CHECKING:
    from torch import Tensor

    from convmae_kernels.block_mask import BlockMask


def _fake(images, block_index, gh, gw):
    side = images.shape[2] // gh
    return images.new_empty(block_index.shape[0], side * side, images.shape[1])


def _derivatives(ops):
    def setup_context(ctx, inputs, output):
        images, block_index, ctx.gh, ctx.gw = inputs
        ctx.batch = images.shape[0]
        ctx.save_for_backward(block_index)

    def backward(ctx, grad):
        (block_index,) = ctx.saved_tensors
        grad_images = ops.scatter_visible(grad, block_index, ctx.batch, ctx.gh, ctx.gw, 0.0)
        return grad_images, None, None, None

    return backward, setup_context


register(
    "gather_visible(Tensor images, Tensor block_index, SymInt gh, SymInt gw) -> Tensor",
    reference.gather_visible,
    _fake,
    _derivatives,
)


def gather_visible(images: Tensor, mask: BlockMask, *, impl: Impl = "auto") -> Tensor:
    """The visible blocks of feature maps: `[B, C, H, W] -> [T, s*s, C]`, `s = H // gh`.

    Args:
        images: float32, bfloat16, float16 or float64 `[B, C, gh*s, gw*s]`, any strides, `s` one of
            1, 2, 4, 8, 16, 32. Hidden positions are not read.
        mask: the visible blocks, for `B` images.
        impl: which implementation runs; "auto" is the fastest that is there.

    Returns:
        Packed features `[T, s*s, C]`, contiguous, in the dtype of `images`. Differentiable; the
        gradient of a hidden position is 0.

    Raises:
        TypeError: `images` is not a tensor of one of the dtypes, or `mask` is not a `BlockMask`.
        ValueError: rank, device, batch size or image size do not fit the mask.
        RuntimeError: `impl` was named and cannot run.
    """
    check_tensor("images", images, 4, "[B, C, H, W]", mask)
    gh, gw = mask.grid
    batch, _, height, width = images.shape
    if batch != mask.batch_size:
        raise ValueError(f"images has batch size {batch}, but the mask is for {mask.batch_size}")
    side = height // gh
    if (height, width) != (gh * side, gw * side) or side not in BLOCK_SIZES:
        raise ValueError(
            f"images of {height} x {width} do not divide into a grid of {gh} x {gw} square blocks "
            f"of side {', '.join(map(str, BLOCK_SIZES))}"
        )
    sizes = Sizes(side, images.shape[1])
    impl = as_measured(impl, "gather_visible", images, sizes)
    run = select(impl, "gather_visible", reference.gather_visible, images, mask)
    return run(images, mask.block_index, gh, gw)
