"""Block-sparse masked convolution for PyTorch that skips hidden regions, exactly."""

from convmae_kernels import torch_version  # noqa: F401  first: it refuses a torch that is too old

# isort: split
from convmae_kernels import nn
from convmae_kernels.block_mask import BlockMask
from convmae_kernels.explain import Explanation, explain
from convmae_kernels.functional import (
    masked_avg_pool2d,
    masked_batch_norm,
    masked_grn,
    masked_group_norm,
    masked_instance_norm,
    masked_max_pool2d,
    masked_sync_batch_norm,
)
from convmae_kernels.info import info
from convmae_kernels.ops import (
    gather_visible,
    gather_windows,
    masked_conv2d,
    masked_conv_transpose2d,
    scatter_visible,
)
from convmae_kernels.ops.support.choices import use_table, use_table_of_environment
from convmae_kernels.packed import EquivalenceError, Packed, check_equivalence, sparsify
from convmae_kernels.zorder import from_zorder, to_zorder

__version__ = "0.1.0"

__all__ = [
    "BlockMask",
    "EquivalenceError",
    "Explanation",
    "Packed",
    "check_equivalence",
    "explain",
    "from_zorder",
    "gather_visible",
    "gather_windows",
    "info",
    "masked_avg_pool2d",
    "masked_batch_norm",
    "masked_conv2d",
    "masked_conv_transpose2d",
    "masked_grn",
    "masked_group_norm",
    "masked_instance_norm",
    "masked_max_pool2d",
    "masked_sync_batch_norm",
    "nn",
    "scatter_visible",
    "sparsify",
    "to_zorder",
    "use_table",
]

use_table_of_environment()
