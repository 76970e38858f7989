"""Checks of arguments that several ops share; every message names what was found and expected."""

from __future__ import annotations

from torch import Tensor

from convmae_kernels.block_mask import BlockMask
from convmae_kernels.ops.support.dtypes import DTYPES
from convmae_kernels.zorder import block_side


def check_tensor(name: str, x: Tensor, rank: int, shape: str, mask: BlockMask) -> None:
    """`x` is a floating tensor of the given rank on the mask's device.

    Raises:
        TypeError: not a tensor, not a mask, or a dtype that the kernels do not have.
        ValueError: another rank or another device.
    """
    if not isinstance(mask, BlockMask):
        raise TypeError(f"mask must be a BlockMask, got {type(mask).__name__}")
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.dim() != rank:
        raise ValueError(f"{name} must be {shape}, got {x.dim()} dimensions: {list(x.shape)}")
    if x.device != mask.device:
        raise ValueError(f"{name} is on {x.device}, but the mask is on {mask.device}")


def check_packed(name: str, x: Tensor, mask: BlockMask) -> int:
    """`x` is packed features `[T, s*s, C]` of this mask; returns the block side `s`.

    Raises:
        TypeError, ValueError: see `check_tensor`; or `T` or `s*s` does not fit.
    """
    check_tensor(name, x, 3, "packed features [T, s*s, C]", mask)
    if x.shape[0] != mask.num_visible:
        raise ValueError(
            f"{name} has {x.shape[0]} blocks, but the mask has {mask.num_visible} visible ones"
        )
    return block_side(x.shape[1])
