"""Anchors and the proposals of boxes: torchvision's region proposal network, as published."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchvision.models.detection.image_list import ImageList

HALVES = (torch.float16, torch.bfloat16)


def as_float32(x: Tensor) -> Tensor:
    """Float32 of a half type, in which boxes cannot be told to a pixel; others as they are."""
    return x.float() if x.dtype in HALVES else x


class Anchors(AnchorGenerator):
    """torchvision's anchors, not rounded, at the strides of the maps.

    Args:
        sizes: side of the square anchor of each map, in pixels.
        aspect_ratios: height / width of the anchors at each position.
        strides: pixels to a position of each map.
    """

    def __init__(
        self, sizes: Sequence[float], aspect_ratios: Sequence[float], strides: Sequence[int]
    ) -> None:
        shapes = tuple(aspect_ratios)
        super().__init__(tuple((size,) for size in sizes), (shapes,) * len(sizes))
        self.strides = tuple(strides)

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> Tensor:
        """`[-w, -h, w, h] / 2` of each ratio, with `w * h = scale**2` and `h / w = ratio`.

        On the CPU, even of a model that is built without values on the meta device.
        """
        device = torch.device("cpu") if device is None else device
        scale = torch.tensor(scales, dtype=dtype, device=device)
        root = torch.tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        w = (scale[None, :] / root[:, None]).flatten()
        h = (scale[None, :] * root[:, None]).flatten()
        return torch.stack([-w, -h, w, h], dim=1) / 2

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        """As in torchvision; nothing is set where nothing changes, as exported programs ask."""
        if any((cells.dtype, cells.device) != (dtype, device) for cells in self.cell_anchors):
            super().set_cell_anchors(dtype, device)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """For each image the anchors `[A, 4]` of all maps: map, row, column, ratio; float32."""
        first = feature_maps[0]
        self.set_cell_anchors(torch.promote_types(first.dtype, torch.float32), first.device)
        strides = [[torch.tensor(s, device=first.device)] * 2 for s in self.strides]
        anchors = torch.cat(self.grid_anchors([x.shape[-2:] for x in feature_maps], strides))
        return [anchors] * len(image_list.image_sizes)


class ProposalHead(RPNHead):
    """torchvision's `RPNHead`, whose outputs are float32 under autocast too."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps `[N, C, h, w]` to logits `[N, A, h, w]` and offsets `[N, 4 A, h, w]` of each."""
        logits, deltas = super().forward(x)
        return [as_float32(y) for y in logits], [as_float32(y) for y in deltas]


class ProposalNetwork(RegionProposalNetwork):
    """torchvision's `RegionProposalNetwork` with the published losses."""

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Sums of binary cross-entropy and of L1 over the sampled anchors, by one divisor.

        It is the number of anchors that a picture is to give, times the pictures; torchvision has
        the number of those that are sampled, and a smooth L1.

        Args:
            objectness: logits of all anchors of the batch, `[N * A, 1]`.
            pred_bbox_deltas: offsets, `[N * A, 4]`.
            labels: of each picture `[A]`: 1 an object, 0 none, -1 not counted.
            regression_targets: of each picture, offsets `[A, 4]`.
        """
        positives, negatives = (torch.cat(p).bool() for p in self.fg_bg_sampler(labels))
        divisor = self.fg_bg_sampler.batch_size_per_image * len(labels)
        sampled = positives | negatives
        of_object = F.binary_cross_entropy_with_logits(
            objectness.flatten()[sampled], torch.cat(labels)[sampled], reduction="sum"
        )
        of_box = F.l1_loss(
            pred_bbox_deltas[positives], torch.cat(regression_targets)[positives], reduction="sum"
        )
        return of_object / divisor, of_box / divisor
