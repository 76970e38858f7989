"""What is told of each region: its class, its box and its mask. torchvision's `RoIHeads`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads

from convmae.models.dense_tasks.rcnn.masks import crop_masks
from convmae.models.dense_tasks.rcnn.proposals import as_float32

if TYPE_CHECKING:
    from collections.abc import Callable

    Target = dict[str, Tensor]
    Sizes = list[tuple[int, int]]

BOX_SIZE, MASK_SIZE = 7, 14  # rows and columns of a region's features for its box, for its mask


class BoxPredictor(nn.Module):
    """Class logits, the background last, and an offset of the box for each class but that.

    Args:
        in_features: of a region.
        num_classes: without the background.
    """

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(in_features, num_classes + 1)
        self.bbox_pred = nn.Linear(in_features, 4 * num_classes)
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`[R, in_features]` to float32 `[R, K + 1]` and `[R, 4 K]`."""
        return as_float32(self.cls_score(x)), as_float32(self.bbox_pred(x))


def box_head(width: int, convs: int, features: int, norm: Callable[[int], nn.Module]) -> nn.Module:
    """torchvision's box head, initialised as published: convolutions, then one linear layer.

    Args:
        width: channels of the pooled maps and of the convolutions.
        convs: how many 3x3 convolutions, each with norm and ReLU.
        features: of the linear layer.
        norm: as `norm_layer` makes it.
    """
    size = (width, BOX_SIZE, BOX_SIZE)
    head = FastRCNNConvFCHead(size, [width] * convs, [features], norm_layer=norm)
    for layer in head:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
    return head


def mask_head(
    width: int, convs: int, num_classes: int, norm: Callable[[int], nn.Module]
) -> tuple[nn.Module, nn.Module]:
    """torchvision's mask head and predictor, initialised as published; one mask for each class.

    Args:
        width: channels of the pooled maps and of all convolutions.
        convs: how many 3x3 convolutions, each with norm and ReLU.
        num_classes: without the background.
        norm: as `norm_layer` makes it.
    """
    predictor = MaskRCNNPredictor(width, width, num_classes)
    nn.init.normal_(predictor.mask_fcn_logits.weight, std=0.001)
    for layer in (predictor.conv5_mask, predictor.mask_fcn_logits):
        nn.init.zeros_(layer.bias)
    return MaskRCNNHeads(width, [width] * convs, 1, norm_layer=norm), predictor


class RegionHeads(RoIHeads):
    """torchvision's `RoIHeads` with the published losses, and the background as the last class.

    Labels are 0-based in targets, in losses and in detections.

    Args:
        mask_batch_size_per_image: how many of a picture's regions with an object the mask head is
            trained on; None for all of them.
        **options: of `RoIHeads`.
    """

    def __init__(self, mask_batch_size_per_image: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.mask_batch_size_per_image = mask_batch_size_per_image

    def box_outputs(self, features: list[Tensor], regions: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Class logits `[R, K + 1]`, the background last, and box offsets `[R, 4 K]`."""
        return self.box_predictor(self.box_head(self.box_roi_pool(features, regions)))

    def mask_outputs(self, features: list[Tensor], regions: list[Tensor]) -> Tensor:
        """Mask logits `[R, K, 28, 28]`."""
        pooled = self.mask_roi_pool(features, regions)
        return as_float32(self.mask_predictor(self.mask_head(pooled)))

    def forward(
        self,
        features: list[Tensor],
        proposals: list[Tensor],
        image_shapes: Sizes,
        targets: list[Target] | None = None,
    ) -> tuple[list[Target], Target]:
        """Detections, in training none, and losses, in evaluation none.

        Args:
            features: maps of the pyramid, finest first.
            proposals: of each picture `[R, 4]`.
            image_shapes: `(height, width)` of each picture, without padding.
            targets: in training, of each picture boxes, labels, and masks if there is a mask head.

        Returns:
            Of each picture boxes, labels, scores, and `mask_probabilities` `[n, 1, 28, 28]`; and
            `loss_classifier`, `loss_box_reg`, `loss_mask`.
        """
        if self.training:
            return [], self.losses(features, proposals, image_shapes, targets or [])
        return self.detections(features, proposals, image_shapes), {}

    def losses(
        self,
        features: list[Tensor],
        proposals: list[Tensor],
        image_shapes: Sizes,
        targets: list[Target],
    ) -> Target:
        """Cross-entropy of classes, L1 of the boxes of objects / all regions, and of masks."""
        proposals = [_or_frame(p, size) for p, size in zip(proposals, image_shapes)]
        # torchvision matches and samples with 0 for the background.
        shifted = [target | {"labels": target["labels"] + 1} for target in targets]
        regions, matched, labels, offsets = self.select_training_samples(proposals, shifted)
        logits, deltas = self.box_outputs(features, regions)
        background = logits.shape[1] - 1
        classes = torch.cat(labels) - 1
        is_object = classes >= 0
        found = deltas.unflatten(1, (-1, 4))[is_object, classes[is_object]]
        of_boxes = F.l1_loss(found, torch.cat(list(offsets))[is_object], reduction="sum")
        classes = torch.where(is_object, classes, background)
        losses = {
            "loss_classifier": F.cross_entropy(logits, classes),
            "loss_box_reg": of_boxes / len(classes),
        }
        if self.has_mask():
            losses["loss_mask"] = self.mask_loss(features, regions, matched, labels, targets)
        return losses

    def mask_loss(
        self,
        features: list[Tensor],
        regions: list[Tensor],
        matched: list[Tensor],
        labels: list[Tensor],
        targets: list[Target],
    ) -> Tensor:
        """Mean binary cross-entropy of the masks of regions with an object, in their classes.

        Without any it is 0, of one region of the background: so all processes compute the same
        layers, and norms over the batch get some values.

        Args:
            features: maps of the pyramid.
            regions: those sampled of each picture.
            matched: int64, the object of each.
            labels: int64, 1-based, 0 for the background.
            targets: of each picture masks `[n, H, W]` and labels.
        """
        chosen = [self._with_object(of_picture) for of_picture in labels]
        nothing = sum(map(len, chosen)) == 0
        if nothing:
            chosen[0] = chosen[0].new_zeros(1)
        boxes = [region[index] for region, index in zip(regions, chosen)]
        logits = self.mask_outputs(features, boxes)
        if nothing:
            return logits.sum() * 0.0
        size = logits.shape[-1]
        wanted, classes = [], []
        for box, index, match, target in zip(boxes, chosen, matched, targets):
            objects = match[index]
            wanted.append(crop_masks(target["masks"], objects, box, size))
            classes.append(target["labels"][objects])
        rows = torch.arange(len(logits), device=logits.device)
        return F.binary_cross_entropy_with_logits(
            logits[rows, torch.cat(classes)], torch.cat(wanted).to(logits.dtype)
        )

    def _with_object(self, labels: Tensor) -> Tensor:
        """Which sampled regions of a picture the mask head is trained on."""
        index = torch.where(labels > 0)[0]
        most = self.mask_batch_size_per_image
        if most is None or len(index) <= most:
            return index
        return index[torch.randperm(len(index), device=index.device)[:most]]

    def detections(
        self, features: list[Tensor], proposals: list[Tensor], image_shapes: Sizes
    ) -> list[Target]:
        """Boxes, labels, scores and mask probabilities of each picture."""
        logits, deltas = self.box_outputs(features, proposals)
        # torchvision has the background first, and offsets for it as well.
        first = logits.roll(1, dims=1), F.pad(deltas, (4, 0))
        found = self.postprocess_detections(*first, proposals, image_shapes)
        results = [
            {"boxes": boxes, "labels": labels - 1, "scores": scores}
            for boxes, scores, labels in zip(*found)
        ]
        if self.has_mask():
            boxes = [result["boxes"] for result in results]
            masks = self.mask_outputs(features, boxes).sigmoid()
            for result, of_picture in zip(results, masks.split([len(b) for b in boxes])):
                rows = torch.arange(len(of_picture), device=masks.device)
                result["mask_probabilities"] = of_picture[rows, result["labels"]][:, None]
        return results


def _or_frame(proposals: Tensor, size: tuple[int, int]) -> Tensor:
    """The proposals of a picture, its frame where there are none: some region is always sampled."""
    if len(proposals):
        return proposals
    return proposals.new_tensor([[0, 0, size[1], size[0]]])
