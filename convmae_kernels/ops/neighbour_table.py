"""The packed rows of the blocks around every visible block."""

from __future__ import annotations

import torch
from torch import Tensor

from convmae_kernels.ops import reference
from convmae_kernels.ops.support.dispatch import LIB, register_without_cuda_kernels

LIB.define(
    "neighbour_table(Tensor visible, Tensor block_index, SymInt radius) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIB.impl("neighbour_table", reference.neighbour_table, "CompositeExplicitAutograd")
register_without_cuda_kernels("neighbour_table", reference.neighbour_table)


@torch.library.register_fake("convmae::neighbour_table", lib=LIB)
def _fake(visible: Tensor, block_index: Tensor, radius: int) -> Tensor:
    side = 2 * radius + 1
    return visible.new_empty(block_index.shape[0], side * side, dtype=torch.int32)
