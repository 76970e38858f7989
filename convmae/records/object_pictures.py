"""Objects drawn on pictures: masks, boxes, names and scores; sheets to compare with the truth."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from convmae.records.label_pictures import to_show

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image as PILImage
    from torch import Tensor

CELL = 360  # pixels of the longer side of a picture on a sheet
GAP, LINE = 6, 18
STRENGTH = 0.45  # of the colour of a mask
GOLDEN = 0.618  # of a turn of the hues from class to class
HEADINGS = ("truth", "prediction")


@dataclass
class DrawnObjects:
    """What is drawn on a picture.

    Attributes:
        boxes: `[n, 4]`, left, top, right, bottom in pixels.
        labels: `[n]`, numbers of classes.
        masks: bool `[n, h, w]`; None for boxes alone.
        scores: `[n]`; None of what is true.
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor | None = None
    scores: Tensor | None = None


class ComparedObjects(NamedTuple):
    """A picture `[C, h, w]` as stored, its true and its found objects, and a line below it."""

    image: Tensor
    truth: DrawnObjects
    found: DrawnObjects
    caption: str = ""


def class_colour(label: int) -> tuple[int, int, int]:
    """A bright colour for a class, far from those of the classes before it."""
    hue = (0.08 + label * GOLDEN) % 1.0
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.75, 1.0))
    return red, green, blue


def picture_with(
    image: Tensor, objects: DrawnObjects, names: Sequence[str], longer_side: int | None = None
) -> np.ndarray:
    """A stored picture `[C, h, w]` with its objects, uint8 `[H, W, 3]`.

    Args:
        image: of any number of channels.
        objects: in its pixels.
        names: of the classes.
        longer_side: of the result; that of the picture if not given.
    """
    from PIL import Image
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

    picture = Image.fromarray(to_show(image))
    factor = 1.0 if longer_side is None else longer_side / max(picture.size)
    if factor != 1.0:
        size = [max(1, round(side * factor)) for side in picture.size]
        picture = picture.resize((size[0], size[1]))
    canvas = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
    labels = objects.labels.tolist()
    if not labels:
        return canvas.permute(1, 2, 0).numpy()
    colours = [class_colour(label) for label in labels]
    if objects.masks is not None:
        masks = F.interpolate(objects.masks[:, None].float().cpu(), canvas.shape[1:])[:, 0] > 0.5
        for mask, colour in zip(masks, colours):  # one by one: they may overlap
            canvas = draw_segmentation_masks(canvas, mask, alpha=STRENGTH, colors=colour)
    texts = [names[label] for label in labels]
    if objects.scores is not None:
        scores = objects.scores.tolist()
        texts = [f"{text} {100 * score:.0f} %" for text, score in zip(texts, scores)]
    border = torch.tensor([canvas.shape[2], canvas.shape[1]] * 2, dtype=torch.float32)
    boxes = (objects.boxes.cpu().float() * factor).minimum(border - 1)
    drawn = draw_bounding_boxes(
        canvas,
        boxes,
        labels=texts,
        colors=list(colours),
        width=2,
        label_colors="black",
        label_background_colors=list(colours),
        fill_labels=True,
    )
    return drawn.permute(1, 2, 0).numpy()


def object_sheet(rows: Sequence[ComparedObjects], names: Sequence[str]) -> PILImage.Image:
    """One row a picture: the truth on the left, what was found on the right; a line below.

    Args:
        rows: at least one.
        names: of the classes.
    """
    from PIL import Image, ImageDraw

    cells = [
        [picture_with(image, objects, names, CELL) for objects in (truth, found)]
        for image, truth, found, _ in rows
    ]
    heights = [row[0].shape[0] + LINE + GAP for row in cells]
    width = max(cell.shape[1] for row in cells for cell in row) + GAP
    sheet = Image.new("RGB", (GAP + 2 * width, LINE + GAP + sum(heights)), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for column, heading in enumerate(HEADINGS):
        draw.text((GAP + column * width, 3), heading, fill=(0, 0, 0))
    top = LINE + GAP
    for row, (*_, caption), height in zip(cells, rows, heights, strict=True):
        for column, cell in enumerate(row):
            sheet.paste(Image.fromarray(cell), (GAP + column * width, top))
        draw.text((GAP, top + row[0].shape[0] + 3), caption[-90:], fill=(90, 90, 90))
        top += height
    return sheet
