"""A small head for a segmenter, for CPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from convmae.models.dense_tasks.head_layers import ConvNorm, class_layer, resized

if TYPE_CHECKING:
    from collections.abc import Sequence


class LightHead(nn.Module):
    """`conv1x1(dropout(conv3x3(relu(sum of resized(batch_norm(conv1x1(map)))))))`.

    All maps are brought to the same width and to the size of the finest, and added.

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
        self.lateral_convs = nn.ModuleList(
            ConvNorm(width, channels, 1, activation=False) for width in in_channels
        )
        self.fusion = ConvNorm(channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = class_layer(channels, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps `[N, C_i, H_i, W_i]`, finest first, to logits `[N, num_classes, H_0, W_0]`."""
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, maps)]
        x = laterals[0]
        for coarser in laterals[1:]:
            x = x + resized(coarser, x.shape[2:])
        return self.conv_seg(self.dropout(self.fusion(F.relu(x))))
