"""One picture file to RGB: every mode Pillow knows, upright, decoded no larger than needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

    from PIL import Image as PILImage

ORIENTATION_TAG = 0x0112
WHITE = (255, 255, 255, 255)


class DataError(ValueError):
    """The pictures asked for cannot be used: missing, empty, or too many of them unreadable."""


def upright_size(image: PILImage.Image) -> tuple[int, int]:
    """`(height, width)` in pixels after the EXIF orientation, read from the header alone."""
    width, height = image.size
    sideways = image.getexif().get(ORIENTATION_TAG, 1) >= 5  # 5 to 8 turn by a quarter
    return (width, height) if sideways else (height, width)


def to_rgb(image: PILImage.Image) -> PILImage.Image:
    """Any Pillow mode to RGB, 8 bits a channel.

    16-bit grey is divided by 256; 32-bit integer and float pictures, which have no fixed range, are
    stretched from their own smallest value to their largest; transparent pixels are laid on
    white; CMYK, YCbCr, palette and bilevel pictures go through Pillow's own conversion.

    Raises:
        ValueError: Pillow knows no way from this mode to RGB (Lab, for example).
    """
    from PIL import Image

    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.int64)  # a 16-bit range, however it is stored
        return Image.fromarray((values >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if mode in ("I", "F"):
        wide = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0.0, neginf=0.0)
        wide -= wide.min()
        grey = wide * 255.0 / (wide.max() or 1.0)
        return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, WHITE), over).convert("RGB")
    return image.convert("RGB")


def read_picture(
    path: Path | BinaryIO, shrink: float = 1.0, formats: tuple[str, ...] | None = None
) -> PILImage.Image:
    """The picture at `path` as an upright RGB image.

    Args:
        path: a file that Pillow can open; of an animation, the first frame.
        shrink: how many times smaller the picture will be used. A JPEG is then decoded directly at
            1/2, 1/4 or 1/8 of its size, the smallest that is still at least `size / shrink`;
            other formats ignore it.
        formats: Pillow's names of the formats to try; all if None.

    Raises:
        OSError, ValueError, SyntaxError: the file cannot be decoded.
        PIL.Image.DecompressionBombError: it claims an absurd number of pixels.
    """
    from PIL import Image, ImageOps

    with Image.open(path, formats=formats) as image:
        if shrink >= 2:
            width, height = image.size
            image.draft(None, (int(width / shrink), int(height / shrink)))
        image.load()
        upright = ImageOps.exif_transpose(image)
        upright.format = image.format  # a copy forgets it
        return to_rgb(upright)
