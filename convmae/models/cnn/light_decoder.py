"""SparK's decoder: from the maps of all scales, coarsest first, to pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from convmae.models.cnn.merged_up_sampling import up_sample_and_convolve
from convmae.models.cnn.visible_convolution import (
    convolve_with_token,
    fill_with_token,
    project_with_token,
    up_sample_with_token,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convmae_kernels import BlockMask


class TokenMap(NamedTuple):
    """A dense map that is not made yet: packed features, and what every hidden position holds.

    Attributes:
        features: `[T, s*s, C]`.
        mask: the mask that they were packed with.
        token: `[C]` or `[1, C, 1, 1]`.
    """

    features: Tensor
    mask: BlockMask
    token: Tensor

    def dense(self) -> Tensor:
        """`[B, C, gh * s, gw * s]`."""
        return fill_with_token(*self)


class Projection(nn.Conv2d):
    """A convolution of a `TokenMap` that keeps its size: of 1 x 1 to another, of 3 x 3 to a map.

    The multiplications are those of the visible positions.

    Args:
        channels: of the input.
        width: channels of the output.
        kernel_size: 1 or 3.
    """

    def __init__(self, channels: int, width: int, kernel_size: int) -> None:
        super().__init__(channels, width, kernel_size, padding=kernel_size // 2)

    def forward(self, x: TokenMap) -> TokenMap | Tensor:  # type: ignore[override]
        features, mask, token = x
        if self.kernel_size != (1, 1):
            return convolve_with_token(features, mask, token, self.weight, self.bias)
        features, token = project_with_token(features, token, self.weight, self.bias)
        return TokenMap(features, mask, token)


class UNetBlock(nn.Module):
    """`[B, c, h, w] -> [B, c / 2, 2h, 2w]`: up-sampling and two convolutions.

    A transposed convolution of 4 x 4 doubles the size; then a 3 x 3 convolution, BatchNorm, ReLU6,
    a 3 x 3 convolution to half the channels, BatchNorm. The first two are computed as one where
    that takes fewer multiplications; of a `TokenMap` the first multiplies visible positions only.

    Args:
        width: channels `c` of the input; even.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.up_sample = nn.ConvTranspose2d(width, width, 4, stride=2, padding=1)
        self.conv = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU6(inplace=True),
            nn.Conv2d(width, half, 3, padding=1, bias=False),
            nn.BatchNorm2d(half),
        )

    def forward(self, x: Tensor | TokenMap) -> Tensor:
        up, (first, *rest) = self.up_sample, self.conv
        if isinstance(x, TokenMap):
            y = first(up_sample_with_token(*x, up.weight, up.bias))
        else:
            y = up_sample_and_convolve(x, up.weight, up.bias, first.weight)
        for layer in rest:
            y = layer(y)
        return y


class LightDecoder(nn.Module):
    """`x = dec[i](x + maps[i])` for `i = 0, 1, ...`, then a 1 x 1 convolution to pixels.

    Args:
        stride: of the coarsest map, a power of two: there are `log2(stride)` blocks.
        width: channels of the coarsest map; each finer one has half of them.
        out_chans: channels of the picture.
    """

    def __init__(self, stride: int, width: int, out_chans: int) -> None:
        super().__init__()
        levels = stride.bit_length() - 1
        self.dec = nn.ModuleList(UNetBlock(width >> i) for i in range(levels))
        self.proj = nn.Conv2d(width >> levels, out_chans, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Convolutions trunc-normal .02, transposed ones kaiming-normal of outputs, biases 0."""
        if self.proj.weight.is_meta:  # PyTorch would import its compiler to draw nothing
            return
        for module in self.modules():
            if isinstance(module, nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, coarsest: TokenMap, maps: Sequence[Tensor | None]) -> Tensor:
        """The picture `[B, out_chans, H, W]`.

        Args:
            coarsest: the input of the first block.
            maps: what is added to the input of each further block, coarsest first; None where there
                is no map of that stride.
        """
        first, *others = self.dec
        x = first(coarsest)
        for block, level in zip(others, maps, strict=True):
            x = block(x if level is None else x + level)
        return self.proj(x)
