"""What a detector is given, and what it finds: batches on a canvas, results in stored pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from convmae.models.dense_tasks.detector import place_detections

if TYPE_CHECKING:
    from torch import Tensor

    from convmae.data import Statistics

GREY = 128 / 255  # of full scale, as the published recipe pads
LEARNED = ("boxes", "labels", "masks")


def padding_of(kind: str) -> str:
    """What fills the canvas around a picture, by the kind of the backbone.

    `grey`: half of full scale, the whole canvas counts as the picture, and detections are scaled
    back by the longer sides; the published recipe of kind "detection". `mean`: 0 after normalising,
    and the canvas counts as far as the picture goes; that of kind "vitdet".
    """
    return "mean" if kind == "vitdet" else "grey"


def canvas(
    images: Tensor, targets: list[dict[str, Tensor]], statistics: Statistics, padding: str
) -> Tensor:
    """Normalised images `[N, C, H, W]` whose canvas around the picture has its final values.

    Args:
        images: normalised; changed in place.
        targets: of each image its `region`.
        statistics: that it was normalised with.
        padding: see `padding_of`.
    """
    mean, std = (torch.tensor(values, device=images.device) for values in statistics)
    fill = ((GREY - mean) / std if padding == "grey" else torch.zeros_like(mean))[:, None, None]
    for image, target in zip(images, targets):
        left, top, right, bottom = target["region"].tolist()
        for part in (image[:, :top], image[:, bottom:], image[..., :left], image[..., right:]):
            part.copy_(fill.expand_as(part))
    return images


def sizes_seen(
    images: Tensor, targets: list[dict[str, Tensor]], padding: str
) -> list[tuple[int, int]]:
    """Height and width of what the detector takes for the picture: with grey the whole canvas."""
    whole = (images.shape[-2], images.shape[-1])
    if padding == "grey":
        return [whole] * len(images)
    return [_filled(target) or whole for target in targets]


def _filled(target: dict[str, Tensor]) -> tuple[int, int] | None:
    """Height and width of the picture on the canvas; None of a filler."""
    left, top, right, bottom = target["region"].tolist()
    return (bottom - top, right - left) if bottom > top and right > left else None


def learned(targets: list[dict[str, Tensor]], device: torch.device) -> list[dict[str, Tensor]]:
    """What of the targets a detector learns from, on its device."""
    return [
        {name: target[name].to(device, non_blocking=True) for name in LEARNED if name in target}
        for target in targets
    ]


@torch.no_grad()
def detections(
    model: Any, images: Tensor, targets: list[dict[str, Tensor]], padding: str, autocast: Any
) -> list[dict[str, Tensor] | None]:
    """What a detector in evaluation finds, in the pixels of the pictures as stored.

    Args:
        model: a `Detector`.
        images: normalised, `[N, C, H, W]`, from `canvas`.
        targets: of each image its `region`, at the upper left, and its stored `size`.
        padding: as in `canvas`.
        autocast: the arithmetic.

    Returns:
        Dictionaries of boxes, labels, scores and masks; None of a filler.
    """
    with autocast:
        found = model.detect(images, sizes_seen(images, targets, padding))
    results: list[dict[str, Tensor] | None] = []
    for each, target in zip(found, targets):
        filled = _filled(target)
        if filled is None:
            results.append(None)
            continue
        height, width = target["size"].tolist()
        whole = {k: v.float() if v.is_floating_point() else v for k, v in each.items()}
        results += place_detections([whole], [filled], [(height, width)], padding == "grey")
    return results
