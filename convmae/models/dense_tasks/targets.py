"""What a detector is trained on: boxes, labels and masks of each picture, checked and clipped."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    Target = dict[str, Tensor]
    Sizes = list[tuple[int, int]]


def clip_targets(
    targets: list[Target], sizes: Sizes, padded: tuple[int, int], num_classes: int, masks: bool
) -> list[Target]:
    """The targets of a batch, with boxes that end at the borders of their pictures.

    A box that is empty then is left out, with its label and its mask.

    Args:
        targets: of each picture: boxes float `[n, 4]`, corners x, y, x, y in pixels; labels int64
            `[n]` from 0 to `num_classes - 1`; masks bool or uint8 `[n, H, W]`, if `masks`.
        sizes: `(height, width)` of each picture.
        padded: of the batch; masks are of it or of their picture's size.
        num_classes: how many classes there are.
        masks: whether masks are needed.

    Returns:
        New dictionaries; boxes are float32, masks as large as the batch.

    Raises:
        ValueError: an entry is missing or of another shape or type, a box is inverted or not
            finite, or there is no such class; the message has the number of the picture.
    """
    if len(targets) != len(sizes):
        raise ValueError(f"targets are of {len(targets)} pictures, but there are {len(sizes)}")
    for number, (target, size) in enumerate(zip(targets, sizes)):
        _check_shapes(target, number, size, padded, masks)
    _check_values(targets, num_classes)
    return [_clip(target, size, padded, masks) for target, size in zip(targets, sizes)]


def _check_shapes(
    target: Target, number: int, size: tuple[int, int], padded: tuple[int, int], masks: bool
) -> None:
    needed = ("boxes", "labels", "masks") if masks else ("boxes", "labels")
    for key in needed:
        if key not in target:
            hint = "; masks=False makes a detector of boxes alone" if key == "masks" else ""
            raise ValueError(f"targets[{number}] has no {key!r}, only {sorted(target)}{hint}")
    boxes, labels = target["boxes"], target["labels"]
    count = len(labels)
    if boxes.shape != (count, 4) or not boxes.is_floating_point():
        raise ValueError(
            f"targets[{number}]['boxes'] must be float [{count}, 4] for {count} labels, got "
            f"{boxes.dtype} {list(boxes.shape)}"
        )
    if labels.dim() != 1 or labels.dtype != torch.int64:
        raise ValueError(
            f"targets[{number}]['labels'] must be int64 [n], got {labels.dtype} "
            f"{list(labels.shape)}"
        )
    if not masks:
        return
    found = target["masks"]
    fits = found.dim() == 3 and len(found) == count and tuple(found.shape[1:]) in (size, padded)
    if not fits or found.dtype not in (torch.bool, torch.uint8):
        raise ValueError(
            f"targets[{number}]['masks'] must be bool or uint8 [{count}, {size[0]}, {size[1]}], "
            f"got {found.dtype} {list(found.shape)}"
        )


def _check_values(targets: list[Target], num_classes: int) -> None:
    """One look at the values of the whole batch: on a GPU each one waits for it."""
    boxes = torch.cat([target["boxes"] for target in targets])
    labels = torch.cat([target["labels"] for target in targets])
    wrong_box = ~boxes.isfinite().all(1) | (boxes[:, 2:] < boxes[:, :2]).any(1)
    wrong_label = (labels < 0) | (labels >= num_classes)
    if not (wrong_box | wrong_label).any():
        return
    row = int(torch.where(wrong_box | wrong_label)[0][0])
    index, number = row, 0
    while index >= len(targets[number]["labels"]):
        index -= len(targets[number]["labels"])
        number += 1
    if wrong_box[row]:
        raise ValueError(
            f"targets[{number}]['boxes'][{index}] is {boxes[row].tolist()}, expected finite x1, "
            "y1, x2, y2 with x1 <= x2 and y1 <= y2"
        )
    raise ValueError(
        f"targets[{number}]['labels'][{index}] is {int(labels[row])}, expected 0 to "
        f"{num_classes - 1}: the background has no label"
    )


def _clip(target: Target, size: tuple[int, int], padded: tuple[int, int], masks: bool) -> Target:
    height, width = size
    border = target["boxes"].new_tensor([width, height, width, height], dtype=torch.float32)
    boxes = target["boxes"].float().clamp(min=0).minimum(border)
    kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
    clipped = {"boxes": boxes[kept], "labels": target["labels"][kept]}
    if masks:
        found = target["masks"][kept]
        rows, columns = padded[0] - found.shape[1], padded[1] - found.shape[2]
        clipped["masks"] = torch.nn.functional.pad(found, (0, columns, 0, rows))
    return clipped
