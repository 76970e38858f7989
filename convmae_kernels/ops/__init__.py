"""One module per op: schema, fake, derivative formulas, public function."""

from convmae_kernels.ops import neighbour_table  # noqa: F401  (a mask calls the registered op)
from convmae_kernels.ops.gather_visible import gather_visible
from convmae_kernels.ops.gather_windows import gather_windows
from convmae_kernels.ops.masked_conv2d import masked_conv2d, masked_conv_transpose2d
from convmae_kernels.ops.norm import (
    masked_batch_norm,
    masked_grn,
    masked_group_norm,
    masked_sync_batch_norm,
)
from convmae_kernels.ops.pooling import masked_avg_pool2d, masked_max_pool2d
from convmae_kernels.ops.scatter_visible import scatter_visible

__all__ = [
    "gather_visible",
    "gather_windows",
    "masked_avg_pool2d",
    "masked_batch_norm",
    "masked_conv2d",
    "masked_conv_transpose2d",
    "masked_grn",
    "masked_group_norm",
    "masked_max_pool2d",
    "masked_sync_batch_norm",
    "scatter_visible",
]
