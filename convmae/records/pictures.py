"""The pictures a run leaves: what the model paints, and how the loss went."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from convmae.data import IMAGENET_MEAN, IMAGENET_STD, normalise
from convmae.files import replacing
from convmae.records.curves import smooth
from convmae.records.wording import is_number
from convmae.seeds import Stream, mask_noise

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from PIL import Image as PILImage
    from torch import Tensor

    from convmae.models import MaskedImageModel

CELL = 176  # pixels a side that a small picture is enlarged to, at least
GAP = 6
LABEL_ROOM = 96  # pixels that a column has for its label, at least
MAX_QUANTILE_VALUES = 2**22  # torch.nanquantile refuses more than 2**24
NOTE_HEIGHT = 18
LABELS = ("original", "masked", "reconstructed", "reconstructed + visible")
NORM_PIX_NOTE = "norm_pix_loss: hidden patches take mean and deviation from the original itself"


@torch.no_grad()
def reconstruction_picture(
    model: MaskedImageModel,
    images: Tensor,
    mask_ratio: float,
    seed: int,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    bands: tuple[int, int, int] | None = None,
) -> PILImage.Image:
    """A labelled grid, one row a picture: original, masked, reconstructed, reconstructed + visible.

    One or two channels are drawn in grey (the first of them), three as red, green and blue, and
    more in false colour. Pictures of 8 bits in grey or RGB are drawn as they are; others are
    stretched, each row alike: black and white are the 2nd and the 98th percentile of the original.
    A note in the picture says which channels were drawn, and whether stretched.

    Args:
        model: a ConvMAE, SparK or FCMAE; left in the mode (training or not) it was in.
        images: uint8, uint16 or floating `[N, C, H, W]`, as stored.
        mask_ratio: share of the patches that is hidden, in `(0, 1)`.
        seed: of the masks.
        mean, std: of each channel, in units of full scale (255, 65535 or 1).
        bands: the channels drawn as red, green and blue, counted from 0; the first three if None.

    Raises:
        ValueError: a band that the pictures do not have.
    """
    device = next(model.parameters()).device
    keys = torch.arange(len(images)).unsqueeze(1)
    noise = mask_noise(keys, model.grid[0] * model.grid[1], seed, Stream.PICTURE).to(device)
    was_training = model.training
    model.eval()
    inputs = normalise(images.to(device), mean, std)
    shift, scale = (torch.tensor(tuple(v), device=device).view(-1, 1, 1) for v in (mean, std))
    painted = model.reconstruct(inputs, mask_ratio=mask_ratio, noise=noise)
    model.train(was_training)
    columns = [inputs, painted.masked, painted.reconstruction, painted.pasted]
    drawn, notes = _bands_to_draw(images.shape[1], bands)
    columns = [(column.float() * scale + shift)[:, drawn] for column in columns]
    if images.dtype != torch.uint8 or images.shape[1] > 3:
        columns = _stretch(columns)
        notes.append("stretched from the 2nd to the 98th percentile of each original")
    if model.config.get("norm_pix_loss", False):
        notes.append(NORM_PIX_NOTE)
    return _sheet([_to_uint8(column) for column in columns], mask_ratio, notes)


def _bands_to_draw(
    channels: int, bands: tuple[int, int, int] | None
) -> tuple[list[int], list[str]]:
    """The channels to draw as red, green and blue, and what must be said of the choice."""
    if bands is not None and (len(bands) != 3 or not all(0 <= band < channels for band in bands)):
        raise ValueError(f"bands must be three of the channels 0 to {channels - 1}, got {bands}")
    if bands is None and channels == 3:
        return [0, 1, 2], []
    if bands is None and channels < 3:
        return [0, 0, 0], [f"channel 0 of {channels}"] if channels > 1 else []
    chosen = list(bands or (0, 1, 2))
    numbers = ", ".join(str(band) for band in chosen)
    return chosen, [f"false colour: red, green, blue are channels {numbers} of {channels} (from 0)"]


def _stretch(columns: list[Tensor]) -> list[Tensor]:
    """Scales `[N, 3, H, W]` so that 2 % of the first column's values lie below 0, 2 % above 1."""
    values = columns[0].flatten(2)
    values = values[..., :: -(-values.numel() // MAX_QUANTILE_VALUES)]
    low = values.nanquantile(0.02, dim=2)[..., None, None]
    high = values.nanquantile(0.98, dim=2)[..., None, None]
    return [(column - low) / (high - low).clamp(min=1e-12) for column in columns]


def _sheet(cells: list[np.ndarray], mask_ratio: float, notes: list[str]) -> PILImage.Image:
    """Columns of uint8 `[N, H, W, 3]` side by side, with labels above and notes below."""
    from PIL import Image

    rows, *size = cells[0].shape[:3]
    factor = max(1, -(-CELL // max(size)))
    height, width = size[0] * factor, size[1] * factor
    header = 26 if width >= 150 else 14
    footer = NOTE_HEIGHT * len(notes) + 4 * bool(notes)
    pitch = max(width, LABEL_ROOM) + GAP
    sheet_size = (
        GAP + len(cells) * pitch,
        header + rows * (height + GAP) + GAP + footer,
    )
    sheet = Image.new("RGB", sheet_size, (255, 255, 255))
    for column, cell in enumerate(cells):
        for row in range(rows):
            picture = Image.fromarray(cell[row]).resize((width, height), Image.Resampling.NEAREST)
            left = GAP + column * pitch + (pitch - GAP - width) // 2
            sheet.paste(picture, (left, header + row * (height + GAP)))
    _write_labels(sheet, pitch, header, mask_ratio, notes)
    return sheet


def _write_labels(
    sheet: PILImage.Image, pitch: int, header: int, mask_ratio: float, notes: list[str]
) -> None:
    from PIL import ImageDraw

    draw = ImageDraw.Draw(sheet)
    size = 13 if header > 14 else 9
    labels = (LABELS[0], f"{LABELS[1]} {mask_ratio:.0%}", *LABELS[2:])
    for column, label in enumerate(labels):
        middle = GAP + column * pitch + (pitch - GAP) // 2
        fitting = _fitting(label, size, pitch - GAP)
        draw.text((middle, header // 2), label, fill=(0, 0, 0), font=fitting, anchor="mm")
    for line, note in enumerate(reversed(notes)):
        fitting = _fitting(note, size, sheet.width - 2 * GAP)
        at = (GAP, sheet.height - NOTE_HEIGHT * (line + 1))
        draw.text(at, note, fill=(160, 0, 0), font=fitting)


def _fitting(text: str, size: int, room: int) -> Any:
    """The font of that size, or of a smaller one in which the text is not wider than the room."""
    from PIL import ImageFont

    share = room / ImageFont.load_default(size).getlength(text)
    return ImageFont.load_default(max(6, int(size * min(1, share))))


def _to_uint8(images: Tensor) -> np.ndarray:
    """Float `[N, 3, H, W]`, shown in [0, 1] -> uint8 `[N, H, W, 3]`; NaN is black."""
    shown = images.nan_to_num(0.0).clamp(0, 1)
    return shown.mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def save_picture(picture: PILImage.Image, path: Path) -> None:
    """Writes a picture in place of the old one, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as new:
        picture.save(new)


def loss_picture(entries: list[dict[str, Any]], path: Path) -> None:
    """Draws the finite losses of a log over the steps: as logged, and smoothed (running mean)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = [(entry["step"], entry["loss"]) for entry in entries if is_number(entry.get("loss"))]
    if not points:
        return
    steps, losses = (np.array(values, dtype=float) for values in zip(*points, strict=True))
    figure = Figure(figsize=(7, 4), dpi=120)
    # Margins as they are: to find those that fit takes as long as the drawing.
    figure.subplots_adjust(left=0.12, right=0.97, bottom=0.13, top=0.96)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="0.75", linewidth=1, label="as logged")
    axes.plot(steps, smooth(losses), color="tab:blue", linewidth=2, label="smoothed")
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="upper right")
    with replacing(path) as new:
        figure.savefig(new, format="png")
