"""Which classes a detector takes for which: detections matched with true objects by their boxes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torchvision.ops import box_iou

if TYPE_CHECKING:
    from torch import Tensor

    from convmae.data.objects.annotations import ObjectPicture

LEAST_OVERLAP = 0.5  # IoU of the boxes of two that are the same object


def object_confusion(
    found: dict[str, Tensor], truth: ObjectPicture, num_classes: int, least_score: float
) -> Tensor:
    """int64 `[K + 1, K + 1]`: objects of a picture by their true (rows) and found class (columns).

    Detections are taken from the most likely on. Each is matched with the true object, of any
    class, that overlaps most of those that are still free, if the IoU of their boxes is 0.5 or
    more. The last column counts the true objects that nothing was found of, the last row the
    detections where nothing is; the last number of both is 0. A detection that lies in a group
    (crowd) by half or more counts for nothing, and neither does the group.

    Args:
        found: boxes `[n, 4]` in the pixels of the picture, labels and scores `[n]`.
        truth: the picture's objects.
        num_classes: `K`.
        least_score: detections of a lower score count for nothing.
    """
    matrix = torch.zeros(num_classes + 1, num_classes + 1, dtype=torch.int64)
    kept = found["scores"].cpu() >= least_score
    order = found["scores"].cpu()[kept].argsort(descending=True, stable=True)
    boxes = found["boxes"].cpu().double()[kept][order]
    labels = found["labels"].cpu()[kept][order].tolist()
    objects, groups = truth.only(~truth.crowd), truth.only(truth.crowd)
    overlaps = box_iou(boxes, torch.from_numpy(objects.boxes))
    in_group = _covered(boxes, torch.from_numpy(groups.boxes)) >= LEAST_OVERLAP
    free = torch.ones(len(objects), dtype=torch.bool)
    for overlap, label, grouped in zip(overlaps, labels, in_group.tolist()):
        candidates = torch.where(free, overlap, -1.0)
        best = int(candidates.argmax()) if len(objects) else 0
        if len(objects) and float(candidates[best]) >= LEAST_OVERLAP:
            free[best] = False
            matrix[int(objects.labels[best]), label] += 1
        elif not grouped:
            matrix[num_classes, label] += 1
    for label in objects.labels[free.numpy()].tolist():
        matrix[label, num_classes] += 1
    return matrix


def _covered(boxes: Tensor, groups: Tensor) -> Tensor:
    """The largest share of each box `[n, 4]` that one of the groups `[m, 4]` covers, `[n]`."""
    if not len(boxes) or not len(groups):
        return boxes.new_zeros(len(boxes))
    upper = torch.maximum(boxes[:, None, :2], groups[None, :, :2])
    lower = torch.minimum(boxes[:, None, 2:], groups[None, :, 2:])
    common = (lower - upper).clamp(min=0).prod(-1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    return (common / areas[:, None].clamp(min=1e-12)).amax(1)


def agreement(matrix: Tensor) -> float | None:
    """Of an `object_confusion` the F1 score in per cent: objects found with their class.

    Twice the right ones / (true objects + detections); None where there is neither.
    """
    right = int(matrix.diagonal()[:-1].sum())
    true, found = int(matrix[:-1].sum()), int(matrix[:, :-1].sum())
    return 200.0 * right / (true + found) if true + found else None
