"""The heads of the published segmenter: UPerNet and an auxiliary FCN, as in mmseg 0.11."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from convmae.models.dense_tasks.head_layers import ConvNorm, class_layer, resized

if TYPE_CHECKING:
    from collections.abc import Sequence

POOLED_SIZES = (1, 2, 3, 6)


class UPerHead(nn.Module):
    """Pyramid pooling of the coarsest map, a feature pyramid of all, and classes of their sum.

    Unified perceptual parsing (Xiao and others, 2018), with the names and the numbers of mmseg's
    `UPerHead`.

    Args:
        in_channels: channels of the maps, finest first.
        channels: width of the head.
        num_classes: channels of the output.
        dropout: share of channels that are dropped before the last layer, in training.
    """

    def __init__(
        self, in_channels: Sequence[int], channels: int, num_classes: int, dropout: float = 0.1
    ) -> None:
        super().__init__()
        *finer, coarsest = in_channels
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), ConvNorm(coarsest, channels, 1))
            for size in POOLED_SIZES
        )
        self.bottleneck = ConvNorm(coarsest + len(POOLED_SIZES) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvNorm(width, channels, 1) for width in finer)
        self.fpn_convs = nn.ModuleList(ConvNorm(channels, channels, 3) for _ in finer)
        self.fpn_bottleneck = ConvNorm(len(in_channels) * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = class_layer(channels, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps `[N, C_i, H_i, W_i]`, finest first, to logits `[N, num_classes, H_0, W_0]`."""
        *finer, coarsest = maps
        pooled = [resized(pool(coarsest), coarsest.shape[2:]) for pool in self.psp_modules]
        pyramid = [conv(x) for conv, x in zip(self.lateral_convs, finer)]
        pyramid.append(self.bottleneck(torch.cat([coarsest, *pooled], dim=1)))
        for i in range(len(pyramid) - 1, 0, -1):
            pyramid[i - 1] = pyramid[i - 1] + resized(pyramid[i], pyramid[i - 1].shape[2:])
        outputs = [*(conv(x) for conv, x in zip(self.fpn_convs, pyramid[:-1])), pyramid[-1]]
        size = outputs[0].shape[2:]
        x = self.fpn_bottleneck(torch.cat([resized(x, size) for x in outputs], dim=1))
        return self.conv_seg(self.dropout(x))


class FCNHead(nn.Module):
    """`conv1x1(dropout(relu(batch_norm(conv3x3(x)))))` of one map, as mmseg's `FCNHead`.

    Args:
        in_channels: channels of the map.
        channels: width of the head.
        num_classes: channels of the output.
        dropout: share of channels that are dropped before the last layer, in training.
    """

    def __init__(
        self, in_channels: int, channels: int, num_classes: int, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.convs = nn.Sequential(ConvNorm(in_channels, channels, 3))
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = class_layer(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, in_channels, H, W] -> [N, num_classes, H, W]`."""
        return self.conv_seg(self.dropout(self.convs(x)))
