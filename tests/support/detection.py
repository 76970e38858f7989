"""A small detector, and pictures of plain rectangles for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from convmae.models.dense_tasks.detector import Detector
from tests.support.small_backbone import SmallBackbone

SIZES: dict[str, Any] = {  # for pictures of 64 pixels
    "width": 32,
    "norm": "group",
    "anchor_sizes": (8, 16, 32, 64, 128),
    "canonical_size": 56.0,
    "rpn_convs": 1,
    "rpn_pre_nms_top_n_train": 100,
    "rpn_pre_nms_top_n_test": 100,
    "rpn_post_nms_top_n_train": 50,
    "rpn_post_nms_top_n_test": 50,
    "rpn_batch_size_per_image": 64,
    "box_convs": 1,
    "box_features": 64,
    "box_batch_size_per_image": 32,
    "mask_convs": 1,
}


def small_detector(num_classes: int = 2, seed: int = 0, **options: Any) -> Detector:
    """A detector with fresh parameters, in training."""
    torch.manual_seed(seed)
    return Detector(SmallBackbone(), num_classes, **(SIZES | options))


def rectangles(
    counts: tuple[int, ...] = (2, 2), size: int = 64, seed: int = 0
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Pictures `[N, 3, size, size]` of so many rectangles; class 0 in one channel, 1 in another.

    The rectangles of a picture lie side by side; those of class 1 are high, those of 0 wide.
    """
    generator = torch.Generator().manual_seed(seed)
    images = torch.zeros(len(counts), 3, size, size)
    targets = []
    for image, count in zip(images, counts):
        boxes = torch.zeros(count, 4)
        masks = torch.zeros(count, size, size, dtype=torch.bool)
        labels = torch.arange(count) % 2
        for number, label in enumerate(labels.tolist()):
            width, height = (22, 14) if label == 0 else (14, 24)
            room = size // count - width
            x = number * (size // count) + int(torch.randint(0, room, (1,), generator=generator))
            y = int(torch.randint(0, size - height, (1,), generator=generator))
            image[label, y : y + height, x : x + width] = 2.0
            masks[number, y : y + height, x : x + width] = True
            boxes[number] = torch.tensor([x, y, x + width, y + height])
        targets.append({"boxes": boxes, "labels": labels, "masks": masks})
    return images, targets
