"""Label maps as pictures: colours of classes, overlays, sheets to compare, a confusion matrix."""

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
GAP, LINE = 6, 18
STRENGTH = 0.55  # of the colours in an overlay
MOST_NAMED = 40  # classes that a confusion matrix has names for
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
    """The colours of classes over a picture, uint8 `[h, w, 3]`; not of class 0 and 255."""
    covered = ((classes != 0) & (classes != IGNORED))[..., None]
    mixed = (1 - STRENGTH) * picture + STRENGTH * COLOURS[classes]
    return np.where(covered, mixed, picture).astype(np.uint8)


def comparison_sheet(rows: Sequence[ComparedPicture], notes: Sequence[str] = ()) -> PILImage.Image:
    """One row a picture: the picture, the truth over it, the prediction over it; captions below."""
    from PIL import Image, ImageDraw

    cells = [_row(row) for row in rows]
    pitch = max(cell.width for row in cells for cell in row) + GAP
    heights = [row[0].height + LINE + GAP for row in cells]
    size = (GAP + 3 * pitch, LINE + GAP + sum(heights) + LINE * len(notes))
    sheet = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for column, heading in enumerate(HEADINGS):
        draw.text((GAP + column * pitch, 3), heading, fill=(0, 0, 0))
    top = LINE + GAP
    for row, compared, height in zip(cells, rows, heights, strict=True):
        for column, cell in enumerate(row):
            sheet.paste(cell, (GAP + column * pitch, top))
        caption = _fitting(draw, compared.caption, size[0] - 2 * GAP)
        draw.text((GAP, top + row[0].height + 3), caption, fill=(90, 90, 90))
        top += height
    for note in notes:
        draw.text((GAP, top), _fitting(draw, note, size[0] - 2 * GAP), fill=(160, 0, 0))
        top += LINE
    return sheet


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


def legend(names: Sequence[str]) -> str:
    """The numbers and names of classes in a line."""
    return ", ".join(f"{number} {name}" for number, name in enumerate(names))


def confusion_picture(matrix: Tensor, names: Sequence[str]) -> PILImage.Image:
    """A confusion matrix: of the pixels of each true class (rows) the share of each prediction.

    Args:
        matrix: int64 `[K, K]`, true classes in rows.
        names: of the classes.
    """
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    count = len(names)
    shares = matrix.double() / matrix.sum(1, keepdim=True).clamp(min=1)
    side = min(12.0, 3.2 + 0.3 * count)
    figure = Figure(figsize=(side + 1, side), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    drawn = axes.imshow(shares.numpy(), vmin=0, vmax=1, cmap="Blues")
    axes.set(xlabel="predicted class", ylabel="true class")
    if count <= MOST_NAMED:
        axes.set_xticks(range(count), names, rotation=90)
        axes.set_yticks(range(count), names)
    if count <= 12:
        for row in range(count):
            for column in range(count):
                share = float(shares[row, column])
                colour = "white" if share > 0.5 else "black"
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=colour)
    figure.colorbar(drawn, ax=axes, label="share of the pixels of the true class")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")
