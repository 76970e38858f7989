"""SparK's decoder: from the maps of all scales, coarsest first, to pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence


class UNetBlock(nn.Module):
    """`[B, c, h, w] -> [B, c / 2, 2h, 2w]`: up-sampling and two convolutions.

    A transposed convolution of 4 x 4 doubles the size; then a 3 x 3 convolution, BatchNorm, ReLU6,
    a 3 x 3 convolution to half the channels, BatchNorm.

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

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.up_sample(x))


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
        for module in self.modules():
            if isinstance(module, nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor | None]) -> Tensor:
        """The picture `[B, out_chans, H, W]`.

        Args:
            maps: one for each block, coarsest first; None where there is none of that stride.
        """
        x: Tensor | None = None
        for block, level in zip(self.dec, maps, strict=True):
            if level is not None:
                x = level if x is None else x + level
            x = block(x)
        return self.proj(x)
