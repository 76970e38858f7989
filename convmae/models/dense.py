"""ConvMAE as the official code runs it: every position is computed, and a mask multiplies.

Tests compare `ConvMAE` with it, and benchmarks measure against it. It is written to be fast: memory
is channels-last from the first convolution on, nothing is copied without need, and attention
and the arithmetic of products (`multiply`) are those that `ConvMAE` uses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from convmae.models.convmae import ConvMAE
from convmae.models.layers import add_parameter
from convmae.models.maps import conv_map, flat_map, stage1_map, stage2_map, tokens_of_map

if TYPE_CHECKING:
    from torch import Tensor

    from convmae_kernels import BlockMask


class DenseConvMAE(ConvMAE):
    """`ConvMAE` with dense feature maps `[N, C, H, W]`: the same parameters, the same numbers.

    Stages 1 and 2 compute all positions; each 5x5 convolution's input is multiplied by the mask.
    The decoder predicts, and the loss normalises, all patches. Use it as
    `dense = DenseConvMAE(**model.config); dense.load_state_dict(model.state_dict())`.
    """

    predicts_every_patch = True

    def forward_stages(self, images: Tensor, mask: BlockMask) -> tuple[Tensor, Tensor, Tensor]:
        """Stages 1 and 2 and both fusion convolutions, at every position.

        Returns:
            The feature map of stage 2 `[N, embed_dim[1], 2 * gh, 2 * gw]`, and the outputs of
            stages 1 and 2 as tokens `[N, L, embed_dim[2]]`.
        """
        x = images.contiguous(memory_format=torch.channels_last)
        x = stage1_map(self, x, mask.to_dense(4))
        decoded1 = flat_map(conv_map(x, self.stage1_output_decode))
        x = stage2_map(self, x, mask.to_dense(2))
        decoded2 = flat_map(conv_map(x, self.stage2_output_decode))
        return x, decoded1, decoded2

    def embed(self, images: Tensor, mask: BlockMask) -> tuple[Tensor, Tensor, Tensor]:
        """As in `ConvMAE`: computed for all patches, then gathered to `[T, D]` each."""
        x, decoded1, decoded2 = self.forward_stages(images, mask)
        x = add_parameter(tokens_of_map(self, x), self.pos_embed)
        gathered = [
            tokens.reshape(mask.num_blocks, -1).index_select(0, mask.block_index)
            for tokens in (x, decoded1, decoded2)
        ]
        return gathered[0], gathered[1], gathered[2]
