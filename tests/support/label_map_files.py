"""Miniature data sets of pictures and label maps, drawn: boxes of two kinds on a background."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from pathlib import Path

Image = pytest.importorskip("PIL.Image")

COLOURS = np.array([[40, 60, 40], [220, 40, 40], [40, 80, 230]], np.uint8)  # of each class
SIZE = (40, 56)


def drawn(index: int, size: tuple[int, int] = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """A picture uint8 `[h, w, 3]` and its classes `[h, w]`: 0, with a box of 1 and one of 2."""
    rng = np.random.default_rng(index)
    classes = np.zeros(size, np.uint8)
    for number in (1, 2):
        top, left = rng.integers(0, size[0] // 2), rng.integers(0, size[1] // 2)
        high, wide = rng.integers(size[0] // 4, size[0] // 2, 2)
        classes[top : top + high, left : left + wide] = number
    noise = rng.integers(-20, 20, (*size, 3))
    return np.clip(COLOURS[classes] + noise, 0, 255).astype(np.uint8), classes


def write(path: Path, values: np.ndarray, **options: Any) -> Path:
    """Writes a picture, or an array."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        Image.fromarray(values).save(path, **options)
    return path


def ade_layout(root: Path, train: int = 8, val: int = 3, size: tuple[int, int] = SIZE) -> Path:
    """`images/training/NAME.jpg`, `annotations/training/NAME.png`, and so on of validation."""
    for split, first, count in (("training", 0, train), ("validation", 100, val)):
        for index in range(first, first + count):
            picture, classes = drawn(index, size)
            write(root / "images" / split / f"p{index}.jpg", picture, quality=95)
            write(root / "annotations" / split / f"p{index}.png", classes)
    return root
