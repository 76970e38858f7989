"""Block-sparse masked convolution for PyTorch that skips hidden regions, exactly."""

from convmae_kernels import nn
from convmae_kernels.block_mask import BlockMask, from_zorder, to_zorder
from convmae_kernels.info import info
from convmae_kernels.ops import gather_visible, gather_windows, masked_conv2d, scatter_visible

__version__ = "0.1.0"

__all__ = [
    "BlockMask",
    "from_zorder",
    "gather_visible",
    "gather_windows",
    "info",
    "masked_conv2d",
    "nn",
    "scatter_visible",
    "to_zorder",
]
