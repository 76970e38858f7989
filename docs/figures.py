"""Makes the README's figures: `python docs/figures.py` after `make demo`."""

from __future__ import annotations

import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import Rectangle
from PIL import Image
from skimage import data

import convmae_kernels as ck

DOCS = Path(__file__).resolve().parent
DEMO = DOCS.parent / "runs" / "demo"
SIZE, PATCH = 224, 16
HIDDEN = np.array([235, 235, 235], dtype=np.uint8)


def photograph() -> np.ndarray:
    """A cat, `[224, 224, 3]` uint8."""
    image = Image.fromarray(data.chelsea()).crop((75, 0, 375, 300))
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def draw_masks(path: Path) -> None:
    """One mask at the resolutions of the three stages, and the positions that are computed."""
    grid = (SIZE // PATCH, SIZE // PATCH)
    mask = ck.BlockMask.random(1, grid, 0.75, generator=torch.Generator().manual_seed(3))
    visible = mask.to_dense(PATCH)[0, 0].numpy()
    image = photograph()
    masked = np.where(visible[..., None], image, HIDDEN)
    figure, axes = plt.subplots(1, 5, figsize=(15, 3.5))
    axes[0].imshow(image)
    axes[0].set_title("picture")
    axes[1].imshow(masked)
    axes[1].set_title("mask: 49 of 196 blocks visible")
    for stage, (axis, side) in enumerate(zip(axes[2:], (4, 2, 1), strict=True), start=1):
        axis.imshow(masked)
        step = PATCH / side
        for row, column in mask.visible[0].nonzero().tolist():
            for i in range(side * side):
                y, x = row * PATCH + i // side * step, column * PATCH + i % side * step
                axis.add_patch(
                    Rectangle((x - 0.5, y - 0.5), step, step, fill=False, color="k", lw=0.3)
                )
        positions = mask.num_visible * side * side
        axis.set_title(f"stage {stage}: {positions} of {4 * positions} positions")
    for axis in axes:
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    draw_masks(DOCS / "masks.png")
    shutil.copy(DEMO / "reconstruction.png", DOCS / "reconstruction.png")
