"""ConvViT, the classifier that a pretrained ConvMAE becomes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from convmae.models.layers import TOKEN_EPS, Linear
from convmae.models.trunk import Trunk
from convmae_kernels import BlockMask

if TYPE_CHECKING:
    from collections.abc import Sequence


class ConvViT(Trunk):
    """`head(fc_norm(mean(blocks3(tokens + pos_embed))))`: ConvMAE's encoder on whole images.

    The outputs of stages 1 and 2 are not added to those of stage 3 here, as in the official code.

    Args:
        img_size: height and width of the images, one number for squares; multiples of 16.
        in_chans: channels of the images.
        num_classes: width of the output; 0 for the features themselves (`head` does nothing).
        embed_dim: channels of the three stages.
        depth: blocks of the three stages.
        num_heads: attention heads of stage 3.
        mlp_ratio: hidden / outer channels of the MLPs of the three stages.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0 at the first.
        global_pool: classify the mean of all tokens, after which comes `fc_norm`. Otherwise
            `norm` comes first and the top-left token is classified, as in the official code.

    Attributes:
        config: the arguments as plain values; `ConvViT(**model.config)` is the same architecture.
        img_size: `(height, width)`.
        grid: `(gh, gw)`, the patches of a column and a row.
        patch_size: 16.

    Raises:
        ValueError: a size does not fit; the message names it.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: Sequence[int] = (256, 384, 768),
        depth: Sequence[int] = (2, 2, 11),
        num_heads: int = 12,
        mlp_ratio: Sequence[float] = (4, 4, 4),
        drop_path_rate: float = 0.0,
        global_pool: bool = True,
    ) -> None:
        super().__init__(img_size, in_chans, embed_dim, depth, num_heads, mlp_ratio, drop_path_rate)
        if not isinstance(num_classes, int) or num_classes < 0:
            raise ValueError(f"num_classes must be 0 or a positive number, got {num_classes!r}")
        self.global_pool = global_pool
        self.config: dict[str, Any] = {
            "img_size": list(self.img_size),
            "in_chans": in_chans,
            "num_classes": num_classes,
            "embed_dim": list(embed_dim),
            "depth": list(depth),
            "num_heads": num_heads,
            "mlp_ratio": list(mlp_ratio),
            "drop_path_rate": drop_path_rate,
            "global_pool": global_pool,
        }
        dim = embed_dim[2]
        if not global_pool:
            self.norm = nn.LayerNorm(dim, eps=TOKEN_EPS)
        self.head = Linear(dim, num_classes) if num_classes else nn.Identity()
        if global_pool:
            self.fc_norm = nn.LayerNorm(dim, eps=TOKEN_EPS)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Linear layers and the position embedding N(0, 0.02), biases 0, convolutions as built."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that an optimiser should not decay, besides one-dimensional ones."""
        return {"pos_embed"}

    def forward(self, images: Tensor) -> Tensor:
        """`head(pool(forward_features(images)))`.

        Args:
            images: floating `[N, in_chans, H, W]` of the model's `img_size`, normalised.

        Returns:
            Logits `[N, num_classes]`, or pooled features `[N, D]` if `num_classes` is 0.

        Raises:
            TypeError, ValueError: the images do not fit the model.
        """
        x = self.forward_features(images)
        return self.head(self.fc_norm(x.mean(dim=1)) if self.global_pool else x[:, 0])

    def forward_features(self, images: Tensor) -> Tensor:
        """The tokens of all patches `[N, L, D]`, in raster order; normed without `global_pool`.

        Raises:
            TypeError, ValueError: the images do not fit the model.
        """
        self.check_images(images)
        mask = BlockMask.full(images.shape[0], self.grid, images.device)
        x = self.tokens(self.stage2(self.stage1(images, mask), mask))  # [N * L, D]
        x = x.view(images.shape[0], self.num_patches, -1) + self.pos_embed
        for block in self.blocks3:
            x = block(x)
        return x if self.global_pool else self.norm(x)
