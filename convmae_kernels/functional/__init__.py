"""What is composed of ops: norms and pooling of packed features."""

from convmae_kernels.functional.norm import (
    masked_batch_norm,
    masked_grn,
    masked_group_norm,
    masked_instance_norm,
    masked_sync_batch_norm,
)
from convmae_kernels.functional.pooling import masked_avg_pool2d, masked_max_pool2d

__all__ = [
    "masked_avg_pool2d",
    "masked_batch_norm",
    "masked_grn",
    "masked_group_norm",
    "masked_instance_norm",
    "masked_max_pool2d",
    "masked_sync_batch_norm",
]
