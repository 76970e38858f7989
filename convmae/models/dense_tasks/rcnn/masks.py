"""Masks of objects: what the mask head is to give, and its outputs put into pictures."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

THRESHOLD = 0.5  # of a mask's share of a position, and of a pixel's probability


def crop_masks(masks: Tensor, objects: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Which positions of a `size` x `size` grid within each box belong to the object.

    Args:
        masks: bool or uint8 `[n, H, W]`, of the objects of a picture.
        objects: int64 `[R]`, which of them each box is of.
        boxes: `[R, 4]`, corners in pixels.
        size: rows and columns of the grid.

    Returns:
        float32 `[R, size, size]` of 0 and 1: at least half of the position is covered.
    """
    rois = torch.cat([objects[:, None].to(boxes.dtype), boxes], dim=1)
    with torch.autocast(boxes.device.type, enabled=False):
        found = roi_align(masks[:, None].to(boxes.dtype), rois, (size, size), 1.0, 0, aligned=True)
    return (found[:, 0] >= THRESHOLD).float()


def paste_masks(
    probabilities: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = THRESHOLD
) -> Tensor:
    """The masks of objects at the size of their picture.

    Each mask is stretched over its box, bilinear between the centres of its positions, 0 outside.

    Args:
        probabilities: `[n, 1, m, m]`, of each position in a box.
        boxes: `[n, 4]`, corners in pixels of the picture.
        size: `(height, width)` of the picture.
        threshold: probability from which on a pixel belongs to the object.

    Returns:
        bool `[n, 1, height, width]`.
    """
    height, width = size
    pasted = torch.zeros((len(boxes), 1, height, width), dtype=torch.bool, device=boxes.device)
    first = (boxes[:, :2].floor() - 1).clamp(min=0).long().tolist()
    last = (boxes[:, 2:].ceil() + 1).long().tolist()
    for number, ((left, top), (right, bottom)) in enumerate(zip(first, last)):
        right, bottom = min(right, width), min(bottom, height)
        if right <= left or bottom <= top:
            continue
        x0, y0, x1, y1 = boxes[number].unbind()
        columns = torch.arange(left, right, device=boxes.device, dtype=boxes.dtype) + 0.5
        rows = torch.arange(top, bottom, device=boxes.device, dtype=boxes.dtype) + 0.5
        x = ((columns - x0) / (x1 - x0) * 2 - 1).expand(len(rows), -1)
        y = ((rows - y0) / (y1 - y0) * 2 - 1)[:, None].expand(-1, len(columns))
        at = torch.stack([x, y], dim=-1)[None]
        found = F.grid_sample(probabilities[number][None].to(at.dtype), at, align_corners=False)
        pasted[number, 0, top:bottom, left:right] = found[0, 0] >= threshold
    return pasted
