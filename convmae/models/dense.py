"""ConvMAE as the official code runs it: every position is computed, and a mask multiplies.

Tests compare `ConvMAE` with it, and benchmarks measure against it. It is written to be fast: memory
is channels-last from the first convolution on, nothing is copied without need, and attention
and the arithmetic of products (`multiply`) are those that `ConvMAE` uses.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convmae.models.convmae import ConvMAE
from convmae.models.layers import ConvBlock, PatchEmbed, add_parameter
from convmae_kernels.ops.support.arithmetic import cast_together, multiply

if TYPE_CHECKING:
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
        x = _patch_embed(x, self.patch_embed1)
        visible = mask.to_dense(4).to(x.dtype)
        for block in self.blocks1:
            x = self.run_block(_conv_block, x, block, visible)
        decoded1 = _tokens(_conv2d(x, self.stage1_output_decode))
        x = _patch_embed(x, self.patch_embed2)
        visible = mask.to_dense(2).to(x.dtype)
        for block in self.blocks2:
            x = self.run_block(_conv_block, x, block, visible)
        decoded2 = _tokens(_conv2d(x, self.stage2_output_decode))
        return x, decoded1, decoded2

    def embed(self, images: Tensor, mask: BlockMask) -> tuple[Tensor, Tensor, Tensor]:
        """As in `ConvMAE`: computed for all patches, then gathered to `[T, D]` each."""
        x, decoded1, decoded2 = self.forward_stages(images, mask)
        x = self.patch_embed4(_tokens(_patch_embed(x, self.patch_embed3)))
        x = add_parameter(x, self.pos_embed)
        gathered = [
            tokens.reshape(mask.num_blocks, -1).index_select(0, mask.block_index)
            for tokens in (x, decoded1, decoded2)
        ]
        return gathered[0], gathered[1], gathered[2]


def _conv2d(x: Tensor, conv: nn.Conv2d) -> Tensor:
    padding = conv.kernel_size[0] // 2 if conv.groups > 1 else 0
    function = partial(F.conv2d, stride=conv.stride, padding=padding, groups=conv.groups)
    return multiply(function, x, conv.weight, conv.bias)


def _layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # views: x is channels-last


def _tokens(x: Tensor) -> Tensor:
    """`[N, D, gh, gw] -> [N, L, D]`, a view of channels-last memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _patch_embed(x: Tensor, embed: PatchEmbed) -> Tensor:
    with cast_together(list(embed.parameters()), x):
        return embed.act(_layer_norm(_conv2d(x, embed.proj), embed.norm))


def _conv_block(x: Tensor, block: nn.Module, visible: Tensor) -> Tensor:
    assert isinstance(block, ConvBlock)
    with cast_together(list(block.parameters()), x):
        y = _conv2d(_layer_norm(x, block.norm1), block.conv1) * visible
        x = x + _conv2d(_conv2d(y, block.attn), block.conv2)
        y = block.mlp.act(_conv2d(_layer_norm(x, block.norm2), block.mlp.fc1))
        return x + _conv2d(y, block.mlp.fc2)
