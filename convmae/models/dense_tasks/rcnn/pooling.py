"""Features of regions: from each region's level of the pyramid, by aligned RoIAlign."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from convmae.models.dense_tasks.rcnn.proposals import as_float32

if TYPE_CHECKING:
    from collections.abc import Sequence

CANONICAL_LEVEL = 4  # of a region as large as the canonical size: the map of stride 2**4


class RegionPooling(nn.Module):
    """`roi_align(map of the region's level, region, aligned=True)` with as many samples as pixels.

    The level is `floor(4 + log2(sqrt(area) / canonical_size + 1e-8))`, within those that there are.
    torchvision's `MultiScaleRoIAlign` has regions half a position aside (`aligned=False`), a fixed
    number of samples, and guesses the strides from the sizes of pictures.

    Args:
        strides: of the maps to take features from, each twice the one before.
        output_size: rows and columns of the features of a region.
        canonical_size: side of a region of level 4, in pixels.
    """

    def __init__(
        self, strides: Sequence[int], output_size: int, canonical_size: float = 224.0
    ) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.output_size = output_size
        self.canonical_size = canonical_size
        self.finest = round(math.log2(self.strides[0]))

    def levels(self, regions: Tensor) -> Tensor:
        """Which map each region `[R, 4]` takes its features from: int64 `[R]`, 0 is the finest."""
        width, height = (regions[:, 2:] - regions[:, :2]).unbind(1)
        side = (width * height).sqrt()
        level = torch.floor(CANONICAL_LEVEL + torch.log2(side / self.canonical_size + 1e-8))
        return level.clamp(self.finest, self.finest + len(self.strides) - 1).long() - self.finest

    def forward(
        self, features: list[Tensor], regions: list[Tensor], image_shapes: object = None
    ) -> Tensor:
        """Features of the regions of all images, one image after the other.

        Args:
            features: maps `[N, C, h, w]` of the strides, finest first; others may follow.
            regions: of each of the `N` images `[R_n, 4]`, corners in pixels.
            image_shapes: not used; torchvision's heads hand them over.

        Returns:
            `[sum R_n, C, output_size, output_size]`.
        """
        corners = torch.cat(regions)
        image = torch.cat([torch.full_like(r[:, :1], n) for n, r in enumerate(regions)])
        rows = torch.cat([image, corners], dim=1)
        levels = self.levels(corners)
        first = features[0]
        size = (self.output_size, self.output_size)
        pooled = first.new_zeros((len(rows), first.shape[1], *size))
        for level, (x, stride) in enumerate(zip(features, self.strides)):
            chosen = torch.where(levels == level)[0]
            x = as_float32(x)
            found = roi_align(x, rows[chosen].to(x.dtype), size, 1 / stride, 0, aligned=True)
            pooled[chosen] = found.to(pooled.dtype)
        return pooled
