"""ConvMAE, the pretraining model: encode the visible patches, predict the pixels of the hidden."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from convmae.models.image_model import MaskedImageModel
from convmae.models.layers import (
    TOKEN_EPS,
    Block,
    LayerNorm,
    Linear,
    add_parameter,
    sincos_pos_embed,
)
from convmae.models.maps import conv_map, flat_map, stage1_map, stage2_map, tokens_of_map
from convmae.models.tokens import (
    HiddenPatches,
    key_padding,
    pad,
    token_rows,
    unpad,
)
from convmae.models.trunk import Trunk, check_heads, check_positive
from convmae_kernels.ops.support.arithmetic import cast_together, patch_conv2d
from convmae_kernels.recording import is_exported

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convmae_kernels import BlockMask


class ConvMAE(Trunk, MaskedImageModel):
    """`loss = mse(decoder(encoder(visible patches)), hidden patches)`: ConvMAE.

    After "ConvMAE: Masked Convolution Meets Masked Autoencoders" (Gao et al., 2022); the official
    code's names, shapes, initialisation and numbers. No hidden position is stored or computed in
    the encoder, and the decoder's end is computed for hidden patches only.

    Args:
        img_size: height and width of the images, one number for squares; multiples of 16.
        in_chans: channels of the images.
        embed_dim: channels of the three stages.
        depth: blocks of the three stages.
        num_heads: attention heads of stage 3.
        mlp_ratio: hidden / outer channels of the MLPs of the three stages; the decoder has the
            first, as in the official code.
        decoder_embed_dim: width of the decoder.
        decoder_depth: blocks of the decoder.
        decoder_num_heads: attention heads of the decoder.
        norm_pix_loss: predict pixels normalised by the mean and deviation of their own patch.

    Attributes:
        config: the arguments as plain values; `ConvMAE(**model.config)` is the same architecture.
        img_size: `(height, width)`.
        grid: `(gh, gw)`, the patches of a column and a row.
        patch_size: 16.

    Raises:
        ValueError: a size does not fit; the message names it.
    """

    fixed_positions = True

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        embed_dim: Sequence[int] = (256, 384, 768),
        depth: Sequence[int] = (2, 2, 11),
        num_heads: int = 12,
        mlp_ratio: Sequence[float] = (4, 4, 4),
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        norm_pix_loss: bool = False,
    ) -> None:
        super().__init__(img_size, in_chans, embed_dim, depth, num_heads, mlp_ratio, fusion=True)
        dim, width = embed_dim[2], check_positive("decoder_embed_dim", decoder_embed_dim)
        check_heads("decoder_embed_dim", width, "decoder_num_heads", decoder_num_heads)
        check_positive("decoder_depth", decoder_depth)
        self.norm_pix_loss = norm_pix_loss
        self.config: dict[str, Any] = {
            "img_size": list(self.img_size),
            "in_chans": in_chans,
            "embed_dim": list(embed_dim),
            "depth": list(depth),
            "num_heads": num_heads,
            "mlp_ratio": list(mlp_ratio),
            "decoder_embed_dim": width,
            "decoder_depth": decoder_depth,
            "decoder_num_heads": decoder_num_heads,
            "norm_pix_loss": norm_pix_loss,
        }
        self.norm = LayerNorm(dim, eps=TOKEN_EPS)
        self.decoder_embed = Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, self.num_patches, width))
        self.decoder_blocks = nn.ModuleList(
            Block(width, decoder_num_heads, mlp_ratio[0]) for _ in range(decoder_depth)
        )
        self.decoder_norm = LayerNorm(width, eps=TOKEN_EPS)
        self.decoder_pred = Linear(width, self.patch_size**2 * in_chans)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Linear layers Xavier-uniform with bias 0, the mask token N(0, 0.02), the rest as built.

        Position embeddings are sin-cos and frozen; the last patch embedding is Xavier-uniform as
        one matrix; all other convolutions keep the initialisation of `torch.nn.Conv2d`. Nothing is
        drawn on the meta device, which holds no numbers.
        """
        for parameter in (self.pos_embed, self.decoder_pos_embed):
            parameter.requires_grad_(False)
        if self.pos_embed.is_meta:  # PyTorch would import its compiler to draw nothing
            return
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed3.proj.weight.view(self.pos_embed.shape[2], -1))
        nn.init.normal_(self.mask_token, std=0.02)
        for parameter in (self.pos_embed, self.decoder_pos_embed):
            parameter.copy_(sincos_pos_embed(parameter.shape[2], self.grid))

    # -- forward ----------------------------------------------------------------------------------

    def predict(
        self, images: Tensor, mask: BlockMask, hidden: HiddenPatches | None = None
    ) -> Tensor:
        """`forward_decoder(forward_encoder(images, mask), mask, hidden)`."""
        return self.forward_decoder(self.forward_encoder(images, mask), mask, hidden)

    def forward_encoder(self, images: Tensor, mask: BlockMask) -> Tensor:
        """`norm(blocks3(tokens + pos_embed) + decode1(stage 1) + decode2(stage 2))`.

        Args:
            images: floating `[N, in_chans, H, W]`; hidden pixels are not read.
            mask: the visible patches.

        Returns:
            The latent `[N, K, D]`: the visible patches of each image in raster order. Where their
            number differs between images, `K` is the largest and the rest are rows of zeros.

        Raises:
            TypeError, ValueError: as in `forward`.
        """
        self.check_images(images)
        self.check_mask(images, mask)
        padding = key_padding(mask)
        tokens, decoded1, decoded2 = (pad(x, mask, padding) for x in self.embed(images, mask))
        for block in self.blocks3:
            tokens = self.run_block(block, tokens, padding)
        with cast_together(list(self.norm.parameters()), tokens):
            latent = self.norm(tokens + decoded1 + decoded2)
        return latent if padding is None else latent.masked_fill(padding.unsqueeze(2), 0.0)

    def forward_stages(self, images: Tensor, mask: BlockMask) -> tuple[Tensor, Tensor, Tensor]:
        """Stages 1 and 2 and both fusion convolutions: the convolutional part of the encoder.

        Returns:
            Packed features of stage 2 `[T, 4, embed_dim[1]]`, and the outputs of stages 1 and 2 as
            tokens `[T, embed_dim[2]]`.
        """
        x = self.stage1(images, mask)
        decode1, decode2 = self.stage1_output_decode, self.stage2_output_decode
        with cast_together([*decode1.parameters(), *decode2.parameters()], x):
            decoded1 = patch_conv2d(x, decode1.weight, decode1.bias).flatten(1)
            x = self.stage2(x, mask)
            decoded2 = patch_conv2d(x, decode2.weight, decode2.bias).flatten(1)
        return x, decoded1, decoded2

    def embed(self, images: Tensor, mask: BlockMask) -> tuple[Tensor, Tensor, Tensor]:
        """The input of stage 3, and the outputs of stages 1 and 2 as tokens: `[T, D]` each."""
        if is_exported() and mask.hides_nothing and mask.batch_size == images.shape[0]:
            return self._embed_maps(images)
        x, decoded1, decoded2 = self.forward_stages(images, mask)
        position = self.pos_embed[0].index_select(0, mask.block_index % self.num_patches)
        return add_parameter(self.tokens(x), position), decoded1, decoded2

    def _embed_maps(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`embed` of whole images, made of PyTorch's convolutions."""
        x = stage1_map(self, images)
        decoded1 = flat_map(conv_map(x, self.stage1_output_decode))
        x = stage2_map(self, x)
        decoded2 = flat_map(conv_map(x, self.stage2_output_decode))
        x = add_parameter(tokens_of_map(self, x), self.pos_embed)
        return x.flatten(0, 1), decoded1.flatten(0, 1), decoded2.flatten(0, 1)

    def forward_decoder(
        self, latent: Tensor, mask: BlockMask, hidden: HiddenPatches | None = None
    ) -> Tensor:
        """`pred(norm(blocks(embed(latent) at visible patches, mask token at hidden ones)))`.

        Args:
            latent: `[N, K, D]` from `forward_encoder`.
            mask: the same mask.
            hidden: the patches whose prediction is wanted, from `hidden_patches`; None for all.

        Returns:
            `[N, L, 16 * 16 * C]`, or `[N, H, 16 * 16 * C]` with `hidden`.
        """
        with cast_together(list(self.decoder_embed.parameters()), latent):
            x = unpad(self.decoder_embed(latent), mask)  # [T, width]
        position = self.decoder_pos_embed[0]  # [L, width]
        x = add_parameter(x, position.index_select(0, mask.block_index % self.num_patches))
        x = torch.cat([x, (self.mask_token[0] + position).to(x.dtype)])  # [T + L, width]
        rows = token_rows(mask)
        blocks, last = self.decoder_blocks[:-1], self.decoder_blocks[-1]
        # Before the first block hidden tokens are the same in all images.
        fewer = not is_exported() and x.shape[0] < mask.num_blocks  # one program for every batch
        if len(blocks) and fewer:
            x = self.run_block(blocks[0], x, None, None, rows)
            blocks = blocks[1:]
        else:
            x = rows.spread(x)
        for block in blocks:
            x = self.run_block(block, x)
        x = self.run_block(last, x, None, None if hidden is None else hidden.patches)
        with cast_together([*self.decoder_norm.parameters(), *self.decoder_pred.parameters()], x):
            return self.decoder_pred(self.decoder_norm(x))
