"""ConvViT as the backbone of a segmenter and of two detectors, as their official codes have it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convmae.models.dense_tasks.backbone import ConvViTBackbone
from convmae.models.dense_tasks.batch_norm import batch_norm
from convmae.models.dense_tasks.positions import Grid, RelativePositionTable
from convmae.models.dense_tasks.token_blocks import (
    DecomposedAttention,
    MapAttention,
    MapBlock,
    TableAttention,
)
from convmae.models.layers import CONV_EPS, TOKEN_EPS, resample_pos_embed, sincos_pos_embed
from convmae.models.trunk import check_img_size, check_positive

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

INIT_STD = 0.02
LECUN_CORRECTION = 0.87962566103423978  # standard deviation of N(0, 1) that is cut at 2 of its own
PRETRAINED_GRID = (14, 14)  # of pictures of 224 x 224


class SegmentationConvViT(ConvViTBackbone):
    """Four maps of strides 4, 8, 16, 32; every block of stage 3 sees the whole map.

    Each of these blocks has a table of relative positions and scales of its branches. The map of
    stride 32 is `gelu(batch_norm(conv3x3(map of stride 16, stride=2, padding=0)))`, `(g - 3) // 2 +
    1` positions a side for `g` patches: 15 of 32. The epsilon of every norm is 1e-5. Keys are the
    official ones without `backbone.`; index buffers are not stored.

    Args:
        img_size: height and width that the tables are made for, multiples of 16.
        in_chans, embed_dim, depth, num_heads, mlp_ratio: as in `ConvViT`.
        drop_path_rate: rate of the last block; it rises linearly from 0 at the first.

    Raises:
        ValueError: a size does not fit; the message names it.
    """

    strides = (4, 8, 16, 32)
    least_grid = 3

    def __init__(
        self,
        img_size: int | Sequence[int] = 512,
        in_chans: int = 3,
        embed_dim: Sequence[int] = (256, 384, 768),
        depth: Sequence[int] = (2, 2, 11),
        num_heads: int = 12,
        mlp_ratio: Sequence[float] = (4, 4, 4),
        drop_path_rate: float = 0.0,
    ) -> None:
        grid = _grid(img_size)

        def block(number: int, rate: float) -> MapBlock:
            attn = TableAttention(embed_dim[2], num_heads, grid)
            return MapBlock(attn, embed_dim[2], mlp_ratio[2], rate, CONV_EPS, layer_scale=True)

        super().__init__(
            *(img_size, in_chans, embed_dim, depth, num_heads, mlp_ratio, drop_path_rate, block)
        )
        dim = embed_dim[2]
        self.channels = (embed_dim[0], embed_dim[1], dim, dim)
        self.fpn = nn.Sequential(nn.Conv2d(dim, dim, 3, 2), nn.BatchNorm2d(dim), nn.GELU())
        reset_linears(self)

    def maps(self, images: Tensor) -> list[Tensor]:
        """The maps of pictures whose sides 16 divides."""
        stage1, stage2, x = self.whole_stages(images)
        x = self.add_positions(x, _grid_of(images))
        for block in self.blocks3:
            x = self.run_block(block, x)
        stage3 = x.permute(0, 3, 1, 2)
        convolution, norm, activation = self.fpn
        coarsest = activation(batch_norm(norm, convolution(stage3)))
        return [self.stage_map(y, images) for y in (stage1, stage2)] + [stage3, coarsest]

    def _layer_id(self, name: str) -> int:
        return 0 if name == "pos_embed" else super()._layer_id(name)

    def no_weight_decay(self) -> set[str]:
        """Vectors: biases, norms and the scales of branches. Positions are decayed."""
        return {name for name, p in self.named_parameters() if p.dim() <= 1}


class DetectionConvViT(ConvViTBackbone):
    """Maps of strides 4, 8, 16, 32 (`s0` ... `s3`); blocks of stage 3 see windows or the whole map.

    Windows share one table of relative positions, blocks that see everything another one. `s3` is
    `max_pool2d(s2, 2)`; a row or column that is left over makes one of its own. Keys are the
    official ones without `backbone.bottom_up.`; index buffers are not stored.

    The official code takes pictures of one size, whose grid the windows divide. Here, windows at
    the border of others are completed with zeros to which no token attends, and windows are not
    larger than the map. Stochastic depth drops pictures; the official code drops windows.

    Args:
        img_size: height and width that the table of the whole map is made for, multiples of 16.
        in_chans, embed_dim, depth, num_heads, mlp_ratio: as in `ConvViT`.
        drop_path_rate: rate of the last block; it rises linearly from 0 at the first.
        window_size: side of a window in patches of 16 pixels.
        global_blocks: numbers of the blocks of stage 3 that see the whole map. None for the first,
            the last and two between: 0, 3, 6, 10 of 11; of less than 8 blocks the first and last.

    Raises:
        ValueError: a size does not fit; the message names it.
    """

    strides = (4, 8, 16, 32)

    def __init__(
        self,
        img_size: int | Sequence[int] = 1024,
        in_chans: int = 3,
        embed_dim: Sequence[int] = (256, 384, 768),
        depth: Sequence[int] = (2, 2, 11),
        num_heads: int = 12,
        mlp_ratio: Sequence[float] = (4, 4, 4),
        drop_path_rate: float = 0.0,
        window_size: int = 16,
        global_blocks: Sequence[int] | None = None,
    ) -> None:
        window = (check_positive("window_size", window_size),) * 2
        seeing_all = _global_blocks(global_blocks, depth, _spread_from_first)

        def block(number: int, rate: float) -> MapBlock:
            attn = MapAttention(embed_dim[2], num_heads)
            own = None if number in seeing_all else window
            return MapBlock(attn, embed_dim[2], mlp_ratio[2], rate, TOKEN_EPS, window=own)

        super().__init__(
            *(img_size, in_chans, embed_dim, depth, num_heads, mlp_ratio, drop_path_rate, block)
        )
        self.channels = (embed_dim[0], embed_dim[1], embed_dim[2], embed_dim[2])
        self.windowed_rel_pos_bias = RelativePositionTable(window, num_heads)
        self.global_rel_pos_bias = RelativePositionTable(self.grid, num_heads)
        self.windowed_rel_pos_bias.requires_grad_(len(seeing_all) < depth[2])
        self.global_rel_pos_bias.requires_grad_(bool(seeing_all))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Linear layers N(0, 0.02) cut at one standard deviation, kernels LeCun's, biases 0.

        The position embedding is that of pretraining, resampled and frozen: the official code
        freezes random numbers where it starts without a checkpoint.
        """
        if self.pos_embed.is_meta:
            return
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=INIT_STD, a=-INIT_STD, b=INIT_STD)
            elif isinstance(module, nn.Conv2d):
                std = module.weight[0].numel() ** -0.5 / LECUN_CORRECTION
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)
        pretrained = sincos_pos_embed(self.pos_embed.shape[2], PRETRAINED_GRID)
        positions = resample_pos_embed(pretrained, PRETRAINED_GRID, self.grid, antialias=False)
        self.pos_embed.copy_(positions)
        self.pos_embed.requires_grad_(False)

    def maps(self, images: Tensor) -> list[Tensor]:
        """The maps of pictures whose sides 16 divides."""
        stage1, stage2, x = self.whole_stages(images)
        x = self.add_positions(x, _grid_of(images))
        biases: dict[Grid | None, Tensor] = {}  # of the windows of the blocks; made once
        blocks: Any = self.blocks3
        for block in blocks:
            window = block.window_of(x) if block.window else None
            if window not in biases:
                biases[window] = (
                    self.windowed_rel_pos_bias.window(window)
                    if window
                    else self.global_rel_pos_bias((x.shape[1], x.shape[2]))
                )
            x = self.run_block(block, x, biases[window])
        s2 = x.permute(0, 3, 1, 2)
        s0, s1 = (self.stage_map(y, images) for y in (stage1, stage2))
        return [s0, s1, s2, F.max_pool2d(s2, 2, ceil_mode=True)]

    def _layer_id(self, name: str) -> int:
        return 0 if name == "pos_embed" else super()._layer_id(name)

    def no_weight_decay(self) -> set[str]:
        """Norms, the position embedding and both tables. All other biases are decayed."""
        tables = {name for name, _ in self.named_parameters() if name.endswith("_bias_table")}
        return norm_parameters(self) | tables | {"pos_embed"}


class ViTDetConvViT(ConvViTBackbone):
    """One map of stride 16; blocks of stage 3 see windows or the whole map.

    Relative positions are decomposed and each block's own. The position embedding stays that of
    pretraining, 14 x 14, and is resampled in every pass. Zeros complete the windows at the border
    and take part in the attention, as in the official code. Keys are the official ones without
    `backbone.net.`.

    Args:
        img_size: height and width that the relative positions of the whole map are made for.
        in_chans, embed_dim, depth, num_heads, mlp_ratio: as in `ConvViT`.
        drop_path_rate: rate of the last block; it rises linearly from 0 at the first.
        window_size: side of a window in patches of 16 pixels.
        global_blocks: numbers of the blocks of stage 3 that see the whole map. None for the last of
            each quarter: 1, 4, 7, 10 of 11; of less than 8 blocks that of each half.

    Raises:
        ValueError: a size does not fit; the message names it.
    """

    strides = (16,)
    position_grid = PRETRAINED_GRID

    def __init__(
        self,
        img_size: int | Sequence[int] = 1024,
        in_chans: int = 3,
        embed_dim: Sequence[int] = (256, 384, 768),
        depth: Sequence[int] = (2, 2, 11),
        num_heads: int = 12,
        mlp_ratio: Sequence[float] = (4, 4, 4),
        drop_path_rate: float = 0.0,
        window_size: int = 14,
        global_blocks: Sequence[int] | None = None,
    ) -> None:
        window = (check_positive("window_size", window_size),) * 2
        seeing_all = _global_blocks(global_blocks, depth, _last_of_each)
        grid = _grid(img_size)

        def block(number: int, rate: float) -> MapBlock:
            own = None if number in seeing_all else window
            attn = DecomposedAttention(embed_dim[2], num_heads, own or grid)
            return MapBlock(
                *(attn, embed_dim[2], mlp_ratio[2], rate, TOKEN_EPS),
                window=own,
                padding_counts=True,
            )

        super().__init__(
            *(img_size, in_chans, embed_dim, depth, num_heads, mlp_ratio, drop_path_rate, block),
            conv_eps=TOKEN_EPS,
        )
        self.channels = (embed_dim[2],)
        reset_linears(self)

    def maps(self, images: Tensor) -> list[Tensor]:
        """The map of pictures whose sides 16 divides."""
        x = self.add_positions(self.whole_stages(images)[2], _grid_of(images))
        for block in self.blocks3:
            x = self.run_block(block, x)
        return [x.permute(0, 3, 1, 2)]

    def no_weight_decay(self) -> set[str]:
        """Norms and the position embedding. Biases and relative positions are decayed."""
        return norm_parameters(self) | {"pos_embed"}


@torch.no_grad()
def reset_linears(model: ConvViTBackbone) -> None:
    """Linear layers and the position embedding N(0, 0.02), biases 0, convolutions as built.

    Nothing is drawn on the meta device, which holds no numbers.
    """
    if model.pos_embed.is_meta:
        return
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=INIT_STD)
            nn.init.zeros_(module.bias)
    nn.init.trunc_normal_(model.pos_embed, std=INIT_STD)


def norm_parameters(model: nn.Module) -> set[str]:
    """The names of the parameters of all LayerNorms and BatchNorms."""
    kinds = nn.LayerNorm | nn.modules.batchnorm._BatchNorm
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, kinds)
        for name, _ in module.named_parameters()
    }


def _grid(img_size: int | Sequence[int]) -> Grid:
    height, width = check_img_size(img_size)
    return height // 16, width // 16


def _grid_of(images: Tensor) -> Grid:
    return images.shape[2] // 16, images.shape[3] // 16


def _spread_from_first(blocks: int, count: int) -> list[int]:
    """`count` numbers from 0 to `blocks - 1`, both among them, evenly."""
    return [i * (blocks - 1) // max(count - 1, 1) for i in range(count)]


def _last_of_each(blocks: int, count: int) -> list[int]:
    """The last number of each of `count` parts of `range(blocks)`."""
    return [(i + 1) * blocks // count - 1 for i in range(count)]


def _global_blocks(
    numbers: Sequence[int] | None, depth: Sequence[int], rule: Callable[[int, int], list[int]]
) -> frozenset[int]:
    """The blocks of stage 3 that see the whole map: those that are given, or by a rule.

    Raises:
        ValueError: a number is none of a block.
    """
    blocks = depth[2] if len(depth) == 3 else 0  # other lengths are refused by `Trunk`
    if numbers is None:
        return frozenset(rule(blocks, 4 if blocks >= 8 else min(blocks, 2)))
    if not all(isinstance(i, int) and 0 <= i < blocks for i in numbers):
        raise ValueError(
            f"global_blocks must be numbers of blocks of stage 3, 0 ... {blocks - 1}, got "
            f"{list(numbers)}"
        )
    return frozenset(numbers)
