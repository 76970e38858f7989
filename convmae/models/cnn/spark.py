"""SparK: a convolutional network that sees visible blocks, and a U-Net's decoder that paints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from convmae.models.cnn.light_decoder import LightDecoder, Projection, TokenMap
from convmae.models.cnn.masked_cnn import MaskedCNN
from convmae.models.trunk import check_positive

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from convmae.models.tokens import HiddenPatches
    from convmae_kernels import BlockMask, Packed

DENSIFY_NORMS = ("auto", "bn", "ln", "none")


class SparseEncoder(nn.Module):
    """Holds the network under the name that it has in SparK's files, `sp_cnn`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.sp_cnn = network


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of each position of a map `[B, C, H, W]`, or of a `Packed`."""

    def forward(self, x: Any) -> Any:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SparK(MaskedCNN):
    """`loss = mse(decoder(densify(encoder(visible blocks))), hidden blocks)`: SparK, any network.

    After "Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling" (Tian
    et al., 2023); the official code's names, shapes, initialisation and numbers. The encoder
    computes visible blocks only. Its maps get a learnt vector at hidden positions, and the decoder
    goes from the coarsest to the pixels.

    Args:
        encoder: a network of timm (best with `num_classes=0`), whole or `features_only`, or any
            module that returns a list of maps `[B, C, H, W]`, finest first. It is not copied:
            training this model trains it.
        img_size: height and width of the images, one number for squares; multiples of `mask_size`.
        in_chans: channels of the images.
        mask_ratio: share of hidden blocks.
        mask_size: side of a block in pixels, a multiple of the stride of the network, which is the
            default: 32 mostly.
        mask_rounding: "floor": `int(L * (1 - mask_ratio))` of `L` blocks stay visible, or "round":
            `round(L * (1 - mask_ratio))`.
        decoder_width: channels of the decoder at its coarsest map. The decoder is most of the cost:
            512 halves it, 256 divides it by 9.
        norm_pix_loss: predict pixels normalised by the mean and deviation of their own block.
        densify_norm: norm of the maps before hidden positions are filled: "bn", "ln", "none", or
            "auto": "bn" if the network has BatchNorm, else "ln" if it has LayerNorm, else "none".
        min_stride: maps of smaller strides are not used. By default 4 for networks of timm, and 2
            for a module of one's own.

    Attributes:
        config: the arguments as plain values, without the encoder.
        img_size: `(height, width)`.
        grid: `(gh, gw)`, the blocks of a column and a row.
        patch_size: the side of a block in pixels.

    Raises:
        TypeError: `encoder` is not a module.
        ValueError: a size does not fit, or the encoder cannot run on visible blocks; the message
            says why.
    """

    predicts_every_patch = True  # BatchNorm in the decoder takes all positions

    def __init__(
        self,
        encoder: nn.Module,
        *,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        mask_ratio: float = 0.6,
        mask_size: int | None = None,
        mask_rounding: Literal["floor", "round"] = "round",
        decoder_width: int = 768,
        norm_pix_loss: bool = True,
        densify_norm: str = "auto",
        min_stride: int | None = None,
    ) -> None:
        if min_stride is not None:
            check_positive("min_stride", min_stride)
        super().__init__(
            encoder,
            img_size,
            in_chans,
            mask_ratio,
            mask_size,
            mask_rounding,
            norm_pix_loss,
            min_stride,
        )
        stride = self.maps.stride
        self._check_scales(encoder)
        if not isinstance(decoder_width, int) or decoder_width < 1 or decoder_width % stride:
            raise ValueError(
                f"decoder_width must be a positive multiple of the stride {stride} of the network, "
                f"as it is halved at each scale, got {decoder_width!r}"
            )
        norm = _norm_kind(densify_norm, encoder)
        self.config |= {
            "decoder_width": decoder_width,
            "densify_norm": norm,
            "min_stride": self.maps.strides[0],
        }
        self.sparse_encoder = SparseEncoder(encoder)
        self.dense_decoder = LightDecoder(stride, decoder_width, in_chans)
        # By the number of halvings from the coarsest map; "0" is that one. Some may be missing.
        self.densify_norms, self.densify_projs = nn.ModuleDict(), nn.ModuleDict()
        self.mask_tokens = nn.ParameterDict()
        for level, channels in zip(self._levels()[::-1], self.maps.channels[::-1], strict=True):
            self._add_level(str(level), channels, decoder_width >> level, norm)

    def _check_scales(self, encoder: nn.Module) -> None:
        if len(self.maps.strides) < 2:
            raise ValueError(
                f"encoder {type(encoder).__name__} has maps of one scale only (stride "
                f"{self.maps.stride}), and SparK paints from several; expected a network with "
                "stages, or FCMAE, which needs the coarsest map alone"
            )

    def _add_level(self, level: str, channels: int, width: int, norm: str) -> None:
        """Norm, projection and mask token of one map."""
        norms: dict[str, Callable[[int], nn.Module]] = {
            "bn": nn.BatchNorm2d,
            "ln": lambda c: LayerNorm2d(c, eps=1e-6),
            "none": lambda _: nn.Identity(),
        }
        self.densify_norms[level] = norms[norm](channels)
        kernel = 1 if level == "0" else 3
        same = level == "0" and channels == width
        self.densify_projs[level] = nn.Identity() if same else Projection(channels, width, kernel)
        token = nn.Parameter(torch.zeros(1, channels, 1, 1))
        if not token.is_meta:
            nn.init.trunc_normal_(token, std=0.02, a=-0.02, b=0.02)
        self.mask_tokens[level] = token

    @property
    def network(self) -> nn.Module:
        """The network that is pretrained, as it was given."""
        return self.sparse_encoder.sp_cnn

    @property
    def reference_parameter(self) -> nn.Parameter:
        """A parameter of the dtype and on the device that pictures must have."""
        return self.mask_tokens["0"]

    def decoder_blocks(self) -> list[nn.Module]:
        """The blocks of the decoder."""
        return list(self.dense_decoder.dec)

    def densify(self, packed: Packed, level: str) -> Any:
        """`proj(norm(visible positions), the mask token at hidden ones)`.

        Args:
            packed: a map of the network.
            level: the number of its scale from the coarsest, "0".

        Returns:
            A dense map; a `TokenMap` for the coarsest, whose projection is of single positions.
        """
        normed = self.densify_norms[level](packed)
        filled = TokenMap(normed.features, normed.mask, self.mask_tokens[level])
        return self.densify_projs[level](filled)

    def forward_decoder(self, maps: Sequence[Packed]) -> Tensor:
        """The painted pictures `[N, C, H, W]`, from the maps of `forward_encoder`."""
        levels = dict(zip(map(str, self._levels()), maps, strict=True))
        count = len(self.dense_decoder.dec)
        dense = [
            self.densify(levels[level], level) if level in levels else None
            for level in map(str, range(count))
        ]
        return self.dense_decoder(dense[0], dense[1:])

    def _levels(self) -> list[int]:
        """How often the stride of each map is halved from the coarsest, finest map first."""
        return [(self.maps.stride // s).bit_length() - 1 for s in self.maps.strides]

    def predict(
        self, images: Tensor, mask: BlockMask, hidden: HiddenPatches | None = None
    ) -> Tensor:
        """`[N, L, p * p * C]`: what the decoder paints, cut into blocks."""
        painted = self._patches(self.forward_decoder(self.forward_encoder(images, mask)))
        return painted.reshape(images.shape[0], self.num_patches, -1)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed, besides vectors: the mask tokens."""
        return super().no_weight_decay() | {f"mask_tokens.{level}" for level in self.mask_tokens}


def _norm_kind(densify_norm: str, encoder: nn.Module) -> str:
    """The norm that is meant: bn, ln or none.

    Raises:
        ValueError: there is no such norm.
    """
    if densify_norm not in DENSIFY_NORMS:
        raise ValueError(
            f"densify_norm must be one of {', '.join(DENSIFY_NORMS)}, got {densify_norm!r}"
        )
    if densify_norm != "auto":
        return densify_norm
    modules = list(encoder.modules())
    if any(isinstance(module, _BatchNorm) for module in modules):
        return "bn"
    return "ln" if any("LayerNorm" in type(module).__name__ for module in modules) else "none"
