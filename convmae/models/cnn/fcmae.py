"""FCMAE: a convolutional network that sees visible blocks, and one block that predicts the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convmae.models.cnn.masked_cnn import MaskedCNN
from convmae.models.cnn.visible_convolution import fill_with_token
from convmae.models.tokens import take_tokens
from convmae.models.trunk import check_positive

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convmae.models.tokens import HiddenPatches
    from convmae_kernels import BlockMask

EPS = 1e-6


class GRN(nn.Module):
    """`gamma * (x * G / (mean_c G + 1e-6)) + beta + x`, `G` the norm of each channel of an image.

    Args:
        channels: the last axis of `[B, H, W, C]`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        norm = x.norm(p=2, dim=(1, 2), keepdim=True)
        share = norm / (norm.mean(dim=-1, keepdim=True) + EPS)
        return self.gamma * (x * share) + self.beta + x


class ConvNeXtV2Block(nn.Module):
    """A block of ConvNeXt V2 on a dense map: `x + fc2(grn(gelu(fc1(norm(dwconv(x))))))`.

    Args:
        channels: of the map `[B, C, H, W]`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=EPS)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.grn = GRN(4 * channels)
        self.pwconv2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.pwconv2(self.grn(F.gelu(self.pwconv1(y))))
        return x + y.permute(0, 3, 1, 2)


class PixelPrediction(nn.Conv2d):
    """A 1 x 1 convolution of positions that need not be a map: `[..., C] -> [..., pixels]`.

    Args:
        channels: of a position.
        pixels: numbers that are predicted for it.
    """

    def __init__(self, channels: int, pixels: int) -> None:
        super().__init__(channels, pixels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class FCMAE(MaskedCNN):
    """`loss = mse(pred(decoder(encoder(visible blocks))), hidden blocks)`: FCMAE, any network.

    After "ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders" (Woo et al.,
    2023). The encoder computes visible blocks only, the decoder has one position for each block
    where the blocks are as large as the stride, and the pixels of hidden blocks alone are
    predicted: the step costs little more than the visible part of the network.

    Args:
        encoder: a network of timm (best with `num_classes=0`), whole or `features_only`, or any
            module that returns a list of maps `[B, C, H, W]`, finest first; the last is used. It
            is not copied: training this model trains it.
        img_size: height and width of the images, one number for squares; multiples of `mask_size`.
        in_chans: channels of the images.
        mask_ratio: share of hidden blocks.
        mask_size: side of a block in pixels, a multiple of the stride of the network, which is the
            default: 32 mostly.
        mask_rounding: "floor": `int(L * (1 - mask_ratio))` of `L` blocks stay visible, or "round":
            `round(L * (1 - mask_ratio))`.
        decoder_width: channels of the decoder.
        decoder_depth: blocks of the decoder.
        norm_pix_loss: predict pixels normalised by the mean and deviation of their own block.

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

    def __init__(
        self,
        encoder: nn.Module,
        *,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        mask_ratio: float = 0.6,
        mask_size: int | None = None,
        mask_rounding: Literal["floor", "round"] = "floor",
        decoder_width: int = 512,
        decoder_depth: int = 1,
        norm_pix_loss: bool = True,
    ) -> None:
        super().__init__(
            encoder,
            img_size,
            in_chans,
            mask_ratio,
            mask_size,
            mask_rounding,
            norm_pix_loss,
            coarsest_only=True,
        )
        width = check_positive("decoder_width", decoder_width)
        self.config |= {
            "decoder_width": width,
            "decoder_depth": check_positive("decoder_depth", decoder_depth),
        }
        self.encoder = encoder
        self.proj = nn.Conv2d(self.maps.channels[-1], width, 1)
        self.mask_token = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.decoder = nn.Sequential(*(ConvNeXtV2Block(width) for _ in range(decoder_depth)))
        self.pred = PixelPrediction(width, self.maps.stride**2 * in_chans)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights behind the network trunc-normal .02, biases 0, the mask token N(0, .02)."""
        if self.mask_token.is_meta:  # PyTorch would import its compiler to draw nothing
            return
        for part in (self.proj, self.decoder, self.pred):
            for module in part.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=0.02)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
        nn.init.normal_(self.mask_token, std=0.02)

    @property
    def network(self) -> nn.Module:
        """The network that is pretrained, as it was given."""
        return self.encoder

    @property
    def reference_parameter(self) -> nn.Parameter:
        """A parameter of the dtype and on the device that pictures must have."""
        return self.mask_token

    def decoder_blocks(self) -> list[nn.Module]:
        """The blocks of the decoder."""
        return list(self.decoder)

    def forward_decoder(self, images: Tensor, mask: BlockMask) -> Tensor:
        """`decoder(proj(coarsest map) at visible positions, the mask token at hidden ones)`."""
        (packed,) = self.forward_encoder(images, mask)
        projected = self.proj(packed)
        return self.decoder(fill_with_token(projected.features, projected.mask, self.mask_token))

    def predict(
        self, images: Tensor, mask: BlockMask, hidden: HiddenPatches | None = None
    ) -> Tensor:
        """`[N, L, p * p * C]`, or `[N, H, p * p * C]` of the hidden patches."""
        x = self.forward_decoder(images, mask)
        times, stride = self.patch_size // self.maps.stride, self.maps.stride
        gh, gw = self.grid
        x = x.unflatten(3, (gw, times)).unflatten(2, (gh, times))  # [N, D, gh, t, gw, t]
        x = x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # [N, L, t * t * D]
        if hidden is not None:
            x = take_tokens(x, hidden.patches)
        pred = self.pred(x.unflatten(2, (times, times, -1)))
        pixels = pred.unflatten(4, (stride, stride, self.in_chans))  # [N, L, t, t, s, s, C]
        return pixels.transpose(3, 4).flatten(2)
