"""Stages 1 and 2 on dense feature maps `[N, C, H, W]`: every position, by PyTorch's convolutions.

The parameters are those of the layers for packed features, and so are the numbers where nothing is
hidden. Exported programs of whole images are made of these: they hold no op of ours.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from convmae_kernels.ops.support.arithmetic import cast_together, multiply

if TYPE_CHECKING:
    from convmae.models.layers import ConvBlock, PatchEmbed
    from convmae.models.trunk import Trunk


def stage1_map(trunk: Trunk, images: Tensor, visible: Tensor | None = None) -> Tensor:
    """Images `[N, C, H, W]` to the map of stage 1, `[N, embed_dim[0], 4 * gh, 4 * gw]`.

    Args:
        trunk: a model.
        images: what it takes.
        visible: bool `[N, 1, 4 * gh, 4 * gw]`, False where a position is hidden; None where
            nothing is.
    """
    return _stage_map(trunk, embed_map(images, trunk.patch_embed1), trunk.blocks1, visible)


def stage2_map(trunk: Trunk, x: Tensor, visible: Tensor | None = None) -> Tensor:
    """The map of stage 1 to that of stage 2, `[N, embed_dim[1], 2 * gh, 2 * gw]`.

    Args:
        trunk: a model.
        x: from `stage1_map`.
        visible: as there, `[N, 1, 2 * gh, 2 * gw]`.
    """
    return _stage_map(trunk, embed_map(x, trunk.patch_embed2), trunk.blocks2, visible)


def tokens_of_map(trunk: Trunk, x: Tensor) -> Tensor:
    """The map of stage 2 to tokens `[N, L, embed_dim[2]]`, without the position embedding."""
    x = flat_map(embed_map(x, trunk.patch_embed3))
    with cast_together(list(trunk.patch_embed4.parameters()), x):
        return trunk.patch_embed4(x)


def embed_map(x: Tensor, embed: PatchEmbed) -> Tensor:
    """`embed` of a map."""
    with cast_together(list(embed.parameters()), x):
        return embed.act(_norm_map(conv_map(x, embed.proj), embed.norm))


def conv_map(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """`conv` of a map, in the arithmetic of `multiply`."""
    options = {"stride": conv.stride, "padding": conv.padding, "groups": conv.groups}
    function = partial(F.conv2d, **options)
    return multiply(function, x, conv.weight, conv.bias)


def flat_map(x: Tensor) -> Tensor:
    """`[N, D, gh, gw] -> [N, L, D]`, a view of channels-last memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _stage_map(trunk: Trunk, x: Tensor, blocks: nn.ModuleList, visible: Tensor | None) -> Tensor:
    factor = None if visible is None else visible.to(x.dtype)
    for block in blocks:
        x = trunk.run_block(_block_map, x, block, factor)
    return x


def _norm_map(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # views: x is channels-last


def _block_map(x: Tensor, block: ConvBlock, factor: Tensor | None) -> Tensor:
    with cast_together(list(block.parameters()), x):
        y = conv_map(_norm_map(x, block.norm1), block.conv1)
        y = conv_map(y if factor is None else y * factor, block.attn)
        x = x + block.drop_path(conv_map(y, block.conv2))
        y = block.mlp.act(conv_map(_norm_map(x, block.norm2), block.mlp.fc1))
        return x + block.drop_path(conv_map(y, block.mlp.fc2))
