"""Label maps as pictures: colours of classes, overlays, sheets to compare."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from convmae.config.label_maps import IGNORED
from convmae.data.normalisation import full_scale

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image as PILImage
    from torch import Tensor

CELL = 220  # pixels of the longer side of a picture on a sheet
GAP, LINE, SQUARE = 6, 18, 11
STRENGTH = 0.55  # of the colours in an overlay
MOST_NAMED = 40  # classes that a sheet has names for
HEADINGS = ("picture", "truth", "prediction")


class ComparedPicture(NamedTuple):
    """A picture `[C, h, w]` as stored, its true and its predicted classes `[h, w]`, and a line."""

    image: Tensor
    truth: Tensor
    prediction: Tensor
    caption: str = ""


def class_colours() -> np.ndarray:
    """uint8 `[256, 3]`: the colours of Pascal VOC, black for class 0, cream for what is ignored."""
    numbers = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for place in range(8):
        for channel in range(3):
            bit = numbers >> (3 * place + channel) & 1
            colours[:, channel] |= (bit << (7 - place)).astype(np.uint8)
    return colours


COLOURS = class_colours()


def to_show(image: Tensor) -> np.ndarray:
    """A stored picture `[C, h, w]` as uint8 `[h, w, 3]`: its first three channels, or one in grey.

    8-bit pictures stay as they are; of others the 2nd and the 98th percentile become black and
    white.
    """
    channels = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    values = channels.float().nan_to_num(0.0)
    if image.dtype == torch.uint8:
        return values.byte().permute(1, 2, 0).numpy()
    thinned = values.flatten()[:: -(-values.numel() // 2**22)]
    low, high = (float(torch.quantile(thinned, share)) for share in (0.02, 0.98))
    scale = max(high - low, 1e-12 * full_scale(image.dtype))
    return ((values - low) / scale).clamp(0, 1).mul(255).byte().permute(1, 2, 0).numpy()


def overlay(picture: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """The picture in grey with classes in colours over it, uint8 `[h, w, 3]`; not 0 and 255."""
    picture = np.repeat(picture.mean(-1, keepdims=True), 3, -1)
    covered = ((classes != 0) & (classes != IGNORED))[..., None]
    mixed = (1 - STRENGTH) * picture + STRENGTH * COLOURS[classes]
    return np.where(covered, mixed, picture).astype(np.uint8)


def comparison_sheet(rows: Sequence[ComparedPicture], classes: Sequence[str]) -> PILImage.Image:
    """One row a picture: the picture, its true and its predicted classes; then what colours mean.

    Args:
        rows: at least one.
        classes: names, from class 0 on.
    """
    from PIL import Image, ImageDraw

    cells = [_row(row) for row in rows]
    pitch = max(cell.width for row in cells for cell in row) + GAP
    width = GAP + len(HEADINGS) * pitch
    key = _colour_key(classes, width)
    heights = [row[0].height + LINE + GAP for row in cells]
    top = LINE + GAP
    sheet = Image.new("RGB", (width, top + sum(heights) + key.height), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for column, heading in enumerate(HEADINGS):
        draw.text((GAP + column * pitch, 3), heading, fill=(0, 0, 0))
    for row, compared, height in zip(cells, rows, heights, strict=True):
        for column, cell in enumerate(row):
            sheet.paste(cell, (GAP + column * pitch, top))
        caption = _fitting(draw, compared.caption, width - 2 * GAP)
        draw.text((GAP, top + row[0].height + 3), caption, fill=(90, 90, 90))
        top += height
    sheet.paste(key, (0, top))
    return sheet


def _colour_key(classes: Sequence[str], width: int) -> PILImage.Image:
    """A square in the colour of each of the first `MOST_NAMED` classes, and its name beside it."""
    from PIL import Image, ImageDraw

    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    names = [f"{number} {name}" for number, name in enumerate(classes[:MOST_NAMED])]
    places, left, line = [], GAP, 0
    for name in names:
        room = SQUARE + 4 + int(draw.textlength(name)) + 2 * GAP
        if left > GAP and left + room > width:
            left, line = GAP, line + 1
        places.append((left, line * LINE))
        left += room
    key = Image.new("RGB", (width, (line + 1) * LINE + GAP), (255, 255, 255))
    draw = ImageDraw.Draw(key)
    for number, (name, (x, y)) in enumerate(zip(names, places, strict=True)):
        draw.rectangle((x, y + 2, x + SQUARE, y + 2 + SQUARE), fill=tuple(COLOURS[number].tolist()))
        draw.text((x + SQUARE + 4, y + 2), name, fill=(0, 0, 0))
    return key


def _row(row: ComparedPicture) -> list[PILImage.Image]:
    """The three cells of a row, of one size."""
    from PIL import Image

    picture = to_show(row.image)
    height, width = picture.shape[:2]
    factor = CELL / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    layers = [picture]
    layers += [overlay(picture, part.byte().numpy()) for part in (row.truth, row.prediction)]
    near = Image.Resampling.NEAREST
    return [Image.fromarray(layer).resize(size, near) for layer in layers]


def _fitting(draw: object, text: str, room: int) -> str:
    """The text, its beginning cut off where it is wider than the room."""
    length = draw.textlength  # type: ignore[attr-defined]
    while text and length(text) > room:
        text = "..." + text.removeprefix("...")[1:]
    return text
