"""ConvMAE, the pretraining model: encode the visible patches, predict the pixels of the hidden."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

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
    hidden_patches,
    key_padding,
    pad,
    removed_mask,
    token_rows,
    unpad,
)
from convmae.models.trunk import Trunk, check_heads, check_positive
from convmae_kernels import BlockMask
from convmae_kernels.ops.support.arithmetic import cast_together, patch_conv2d
from convmae_kernels.recording import is_exported

if TYPE_CHECKING:
    from collections.abc import Sequence

NORM_PIX_EPS = 1e-6


class ConvMAEOutput(NamedTuple):
    """What `ConvMAE.forward` returns.

    Attributes:
        loss: mean squared error over the hidden patches, a float32 scalar (float64 for float64).
        mask: float32 `[N, L]`, 1 = removed (hidden), 0 = kept, as in MAE.
        pred: `[N, L, 16 * 16 * C]`, the prediction of every patch; None unless asked for.
    """

    loss: Tensor
    mask: Tensor
    pred: Tensor | None


class Reconstruction(NamedTuple):
    """What `ConvMAE.reconstruct` returns; images are `[N, C, H, W]` in the units of the input.

    Attributes:
        masked: the input, its hidden patches 0 (grey, where pixels are normalised).
        reconstruction: the prediction, at every patch.
        pasted: the input's visible patches, and the prediction at the hidden ones.
        mask: float32 `[N, L]`, 1 = removed (hidden), 0 = kept, as in MAE.
    """

    masked: Tensor
    reconstruction: Tensor
    pasted: Tensor
    mask: Tensor


class ConvMAE(Trunk):
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

    predicts_every_patch = False  # a subclass may predict more than the loss needs
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

    def forward(
        self,
        images: Tensor,
        mask_ratio: float = 0.75,
        noise: Tensor | None = None,
        mask: BlockMask | None = None,
        generator: torch.Generator | None = None,
        return_pred: bool = False,
    ) -> ConvMAEOutput:
        """`mean((pred - patches) ** 2)` over the hidden patches of a batch.

        Args:
            images: floating `[N, in_chans, H, W]` of the model's `img_size`, normalised.
            mask_ratio: share of hidden patches, in `[0, 1)`; with `mask` it is not looked at.
            noise: floating `[N, L]`: the `int(L * (1 - mask_ratio))` patches of smallest noise
                stay visible. Drawn uniformly if neither `noise` nor `mask` is given.
            mask: a mask of one's own, on the grid of 16x16-pixel patches; the number of visible
                patches may differ between images, and the loss is the mean over all hidden ones.
            generator: source of the noise that is drawn.
            return_pred: also return the prediction of every patch, which costs more.

        Returns:
            `ConvMAEOutput(loss, mask, pred)`; its mask is MAE's, 1 = removed. Where nothing is
            hidden the loss is `0 * pred`: 0, with gradients of 0.

        Raises:
            TypeError: an argument has another type or dtype.
            ValueError: shapes, devices or `mask_ratio` do not fit, both `noise` and `mask` are
                given, or an image has no visible patch.
        """
        mask = self.make_mask(images, mask_ratio, noise, mask, generator)
        return self.forward_masked(images, mask, return_pred)

    def forward_masked(
        self, images: Tensor, mask: BlockMask, return_pred: bool = False
    ) -> ConvMAEOutput:
        """`forward` with a mask that fits the images; arguments and result are those of it."""
        latent = self.forward_encoder(images, mask)
        hidden = None if return_pred or self.predicts_every_patch else hidden_patches(mask)
        pred = self.forward_decoder(latent, mask, hidden)
        loss = self.forward_loss(images, pred, mask, hidden)
        return ConvMAEOutput(loss, removed_mask(mask), pred if return_pred else None)

    def make_mask(
        self,
        images: Tensor,
        mask_ratio: float = 0.75,
        noise: Tensor | None = None,
        mask: BlockMask | None = None,
        generator: torch.Generator | None = None,
    ) -> BlockMask:
        """One mask for each image, as in `forward`: the same arguments, the same errors."""
        self.check_images(images)
        if mask is None:
            noise = self.make_noise(images, noise, generator)
            mask = BlockMask.from_noise(noise, self.grid, mask_ratio)
        elif noise is not None:
            raise ValueError("noise and mask are both given, expected at most one of them")
        self.check_mask(images, mask)
        return mask

    def make_noise(
        self, images: Tensor, noise: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """`noise` if it is `[N, L]`; drawn uniformly if it is None."""
        shape = (images.shape[0], self.num_patches)
        if noise is None:
            device = images.device if generator is None else generator.device
            return torch.rand(shape, generator=generator, device=device).to(images.device)
        if not isinstance(noise, Tensor):
            raise TypeError(f"noise must be a floating tensor, got {type(noise).__name__}")
        if noise.shape != shape:
            raise ValueError(
                f"noise must be {list(shape)} (images, patches), got {list(noise.shape)}"
            )
        return noise

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

    def forward_loss(
        self, images: Tensor, pred: Tensor, mask: BlockMask, hidden: HiddenPatches | None = None
    ) -> Tensor:
        """`mean((pred - target) ** 2)` over the hidden patches, in float32 at least.

        Args:
            images: `[N, in_chans, H, W]`.
            pred: from `forward_decoder`, with the same `hidden`.
            mask: the mask; of `G * N` images if each has `G` masks: first all images with their
                first mask, then all with their second, and so on.
            hidden: the patches that `pred` is of; None for all.

        Returns:
            A scalar; 0 where nothing is hidden.
        """
        patches = self._patches(images)  # a view [N, gh, gw, 16, 16, C]
        if hidden is None:
            weight: Tensor | None = removed_mask(mask)
        else:
            weight = hidden.real
            image = torch.arange(mask.batch_size, device=images.device) % images.shape[0]
            image = image.unsqueeze(1)
            row, column = hidden.patches // self.grid[1], hidden.patches % self.grid[1]
            patches = patches[image, row, column].unsqueeze(1)  # hidden patches only
        target = at_least_float(patches.flatten(3).flatten(1, 2))
        if self.norm_pix_loss:
            mean, deviation = patch_statistics(target)
            target = (target - mean) / deviation
        pred = at_least_float(pred).unflatten(0, (-1, target.shape[0]))  # one target, G masks
        error = (pred - target).square().mean(dim=3).flatten(0, 1)
        if weight is None:
            return error.mean()
        return (error * weight).sum() / weight.sum().clamp(min=1)

    # -- pictures ---------------------------------------------------------------------------------

    def patchify(self, images: Tensor) -> Tensor:
        """`[N, C, H, W] -> [N, L, 16 * 16 * C]`: of rows, columns, channels each.

        Raises:
            TypeError, ValueError: the images do not fit the model.
        """
        self.check_images(images)
        return self._patches(images).reshape(images.shape[0], self.num_patches, -1)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """`[N, L, 16 * 16 * C] -> [N, C, H, W]`: the inverse of `patchify`.

        Raises:
            ValueError: the patches do not fit the model.
        """
        size, channels, (gh, gw) = self.patch_size, self.in_chans, self.grid
        expected = (self.num_patches, size**2 * channels)
        if patches.dim() != 3 or patches.shape[1:] != expected:
            raise ValueError(
                f"patches must be [N, {expected[0]}, {expected[1]}], got {list(patches.shape)}"
            )
        x = patches.reshape(-1, gh, gw, size, size, channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, *self.img_size)

    @torch.no_grad()
    def reconstruct(
        self,
        images: Tensor,
        mask_ratio: float = 0.75,
        noise: Tensor | None = None,
        mask: BlockMask | None = None,
        generator: torch.Generator | None = None,
    ) -> Reconstruction:
        """The prediction as pictures: `unpatchify(pred)`, in the units of the input.

        With `norm_pix_loss` the model predicts patches without their brightness and contrast; mean
        and deviation are then taken from the true patches, hidden ones included. The pictures so
        look better than what the model knows: do not measure reconstruction errors on them.

        Args:
            images, mask_ratio, noise, mask, generator: as in `forward`.

        Returns:
            `Reconstruction(masked, reconstruction, pasted, mask)`.

        Raises:
            TypeError, ValueError: as in `forward`.
        """
        mask = self.make_mask(images, mask_ratio, noise, mask, generator)
        pred = at_least_float(self.forward_decoder(self.forward_encoder(images, mask), mask, None))
        patches = self.patchify(images)
        if self.norm_pix_loss:
            mean, deviation = patch_statistics(at_least_float(patches))
            pred = pred * deviation + mean
        pred = pred.to(images.dtype)
        hidden = ~mask.visible.flatten(1).unsqueeze(2)
        return Reconstruction(
            self.unpatchify(patches.masked_fill(hidden, 0.0)),
            self.unpatchify(pred),
            self.unpatchify(torch.where(hidden, pred, patches)),
            removed_mask(mask),
        )

    def _patches(self, images: Tensor) -> Tensor:
        """A view `[N, gh, gw, 16, 16, C]` of images `[N, C, H, W]`."""
        size, (gh, gw) = self.patch_size, self.grid
        tiles = images.unflatten(3, (gw, size)).unflatten(2, (gh, size))
        return tiles.permute(0, 2, 4, 3, 5, 1)


# -- patches --------------------------------------------------------------------------------------


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """`mean` and `sqrt(var + 1e-6)` of each patch, over pixels and channels; unbiased variance.

    Args:
        patches: `[..., 16 * 16 * C]`.

    Returns:
        Two tensors `[..., 1]`.
    """
    var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (var + NORM_PIX_EPS).sqrt()


def at_least_float(x: Tensor) -> Tensor:
    """`x` in float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
