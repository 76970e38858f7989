"""Norms and the feature pyramid of the detector's heads."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from convmae.models.dense_tasks.simple_pyramid import ChannelNorm

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

NORMS = ("batch", "group", "layer")
GROUPS = 32  # of a GroupNorm, or the largest number below that divides the channels


def norm_layer(norm: str) -> Callable[[int], nn.Module]:
    """What makes a norm for maps `[N, C, H, W]` of so many channels.

    Args:
        norm: "batch"; "group" with `GROUPS` groups; "layer" over the channels of each position.

    Raises:
        ValueError: there is no such norm.
    """
    if norm == "batch":
        return nn.BatchNorm2d
    if norm == "layer":
        return ChannelNorm
    if norm == "group":
        return lambda channels: nn.GroupNorm(math.gcd(GROUPS, channels), channels)
    raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")


class FeaturePyramid(FeaturePyramidNetwork):
    """torchvision's `FeaturePyramidNetwork` from a list of maps to a list of maps.

    Each is `norm(conv3x3(norm(conv1x1(map)) + upsampled))`, without activations; the last one is
    every second position of the one before.

    Args:
        channels: of the maps.
        width: channels of all outputs.
        norm: as `norm_layer` makes it.
    """

    def __init__(
        self, channels: Sequence[int], width: int, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__(list(channels), width, LastLevelMaxPool(), norm_layer=norm)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Maps `[N, C_i, H_i, W_i]`, finest first, to one more of `[N, width, ...]`."""
        named = OrderedDict((str(level), x) for level, x in enumerate(maps))
        return list(super().forward(named).values())
