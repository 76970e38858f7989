"""The pictures a run leaves: what the model paints, and how the loss went."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from convmae.data.crops import denormalise, derive_seed, normalise

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image as PILImage
    from torch import Tensor

    from convmae.models import ConvMAE

MASK_STREAM = 2  # keeps the seeds of the masks apart from all others
CELL = 176  # pixels a side that a small picture is enlarged to, at least
GAP = 6
LABELS = ("original", "masked", "reconstructed", "reconstructed + visible")


def mask_noise(
    batch_size: int, patches: int, seed: int, *keys: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Uniform noise `[batch_size, patches]` for a mask, the same on every device."""
    generator = torch.Generator()
    generator.manual_seed(derive_seed(seed, MASK_STREAM, *keys))
    return torch.rand(batch_size, patches, generator=generator).to(device)


@torch.no_grad()
def reconstruction_picture(
    model: ConvMAE, images: Tensor, mask_ratio: float, seed: int
) -> PILImage.Image:
    """A labelled grid, one row a picture: original, masked, reconstructed, reconstructed + visible.

    Args:
        model: a ConvMAE; left in the mode (training or not) it was in.
        images: uint8 `[N, 3, H, W]`.
        mask_ratio: share of the patches that is hidden, in `(0, 1)`.
        seed: of the masks.
    """
    from PIL import Image

    device = next(model.parameters()).device
    noise = mask_noise(len(images), model.grid[0] * model.grid[1], seed, 0, device=device)
    was_training = model.training
    model.eval()
    inputs = normalise(images.to(device))
    painted = model.reconstruct(inputs, mask_ratio=mask_ratio, noise=noise)
    model.train(was_training)
    columns = [inputs, painted.masked, painted.reconstruction, painted.pasted]
    cells = [_to_uint8(denormalise(column)) for column in columns]
    factor = max(1, -(-CELL // max(images.shape[-2:])))
    height, width = images.shape[-2] * factor, images.shape[-1] * factor
    header = 26 if width >= 150 else 14
    norm_pix = bool(model.config.get("norm_pix_loss", False))
    footer = 22 if norm_pix else 0
    sheet_size = (
        GAP + len(cells) * (width + GAP),
        header + len(images) * (height + GAP) + GAP + footer,
    )
    sheet = Image.new("RGB", sheet_size, (255, 255, 255))
    for column, cell in enumerate(cells):
        for row in range(len(images)):
            picture = Image.fromarray(cell[row]).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (GAP + column * (width + GAP), header + row * (height + GAP)))
    _write_labels(sheet, width, header, mask_ratio, norm_pix)
    return sheet


def _write_labels(
    sheet: PILImage.Image, width: int, header: int, mask_ratio: float, norm_pix: bool
) -> None:
    from PIL import ImageDraw, ImageFont

    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13 if header > 14 else 9)
    labels = (LABELS[0], f"{LABELS[1]} {mask_ratio:.0%}", *LABELS[2:])
    for column, label in enumerate(labels):
        middle = GAP + column * (width + GAP) + width // 2
        draw.text((middle, header // 2), label, fill=(0, 0, 0), font=font, anchor="mm")
    if norm_pix:
        note = "norm_pix_loss: hidden patches take mean and deviation from the original itself"
        draw.text((GAP, sheet.height - 18), note, fill=(160, 0, 0), font=font)


def _to_uint8(images: Tensor) -> np.ndarray:
    """Float `[N, 3, H, W]` in [0, 1] -> uint8 `[N, H, W, 3]`."""
    return images.mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def save_picture(picture: PILImage.Image, path: Path) -> None:
    """Writes a picture in place of the old one, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".new.{path.name}")
    picture.save(new)
    os.replace(new, path)


def loss_picture(entries: list[dict[str, Any]], path: Path) -> None:
    """Draws the logged losses over the steps: as logged, and smoothed (running mean)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
    steps, losses = (np.array(values, dtype=float) for values in zip(*points, strict=True))
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="0.75", linewidth=1, label="as logged")
    axes.plot(steps, _smooth(losses), color="tab:blue", linewidth=2, label="smoothed")
    axes.set(xlabel="step", ylabel="loss (mean squared error of hidden patches)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    new = path.with_name(f".new.{path.name}")
    figure.savefig(new, format="png")
    os.replace(new, path)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over about a twentieth of the points, shorter at both ends."""
    reach = max(1, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    middle = np.arange(len(values))
    low, high = np.maximum(middle - reach, 0), np.minimum(middle + reach + 1, len(values))
    return (total[high] - total[low]) / (high - low)
