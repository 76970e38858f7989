"""The real photographs that ship inside the scikit-image wheel: no download, nothing to fetch."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from convmae.data.errors import DataError
from convmae.data.formats.pillow import read_picture
from convmae.data.picture import NO_LABEL, Pixels

if TYPE_CHECKING:
    from convmae.data.crops import PickBox, Size

# The colour photographs among scikit-image's built-in files (public domain or CC0):
# a portrait, a cat, a cup of coffee, the Hubble deep field, a rocket, a motorcycle, a retina and a
# stained tissue section.
DEMO_FILES = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "rocket.jpg",
    "motorcycle_left.png",
    "retina.jpg",
    "ihc.png",
)
CROPS_PER_PHOTO = 64  # an epoch of the demo is this many crops of every photograph


class DemoPhotos:
    """Eight colour photographs, decoded once and kept in memory as uint8 tensors."""

    channels = 3
    dtype = torch.uint8

    def __init__(self) -> None:
        """Decodes the photographs (0.2 s).

        Raises:
            DataError: scikit-image is not installed, or has come without its pictures.
        """
        self._images = _decode()

    def __len__(self) -> int:
        return len(DEMO_FILES)

    def name(self, index: int) -> str:
        return DEMO_FILES[index]

    def label(self, index: int) -> int:
        return NO_LABEL

    def load(self, index: int) -> Tensor:
        return self._images[index]

    def measured(self, index: int) -> Tensor:
        return self._images[index].float()

    def crop(self, index: int, pick: PickBox, size: Size) -> Tensor:
        """`resize(photograph[pick(height, width)], size)`, uint8 `[3, H, W]`."""
        return Pixels(self._images[index]).crop(pick, size)


@cache
def _decode() -> tuple[Tensor, ...]:
    """The photographs, uint8 `[3, h, w]` with channels innermost in memory (quicker to resize)."""
    from importlib.util import find_spec
    from pathlib import Path

    spec = find_spec("skimage")  # found, not imported: only its files are wanted
    if spec is None or spec.origin is None:
        raise DataError(
            "--data_path 'demo' needs scikit-image, whose wheel holds the photographs: "
            "pip install scikit-image"
        )
    folder = Path(spec.origin).parent / "data"
    missing = [name for name in DEMO_FILES if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"--data_path 'demo': {folder} lacks {', '.join(missing)}; "
            "expected scikit-image 0.22 or newer, installed from its wheel"
        )
    pictures = (np.array(read_picture(folder / name)) for name in DEMO_FILES)
    return tuple(torch.from_numpy(picture).permute(2, 0, 1) for picture in pictures)
