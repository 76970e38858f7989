"""Picture files read by Pillow: 8-bit pictures to grey or RGB, decoded no larger than needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image as PILImage

JPEG = {".jpg", ".jpeg", ".jpe", ".jfif"}
NETPBM = {".ppm", ".pgm", ".pbm", ".pnm"}
EXTENSIONS = JPEG | NETPBM | {".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".tga"}
EXTENSIONS |= {".jp2", ".avif"}
# Pillow's names of these formats: a file is opened as no other, whatever its content asks for.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "TGA", "JPEG2000", "AVIF", "PPM")
SHRINKING = ("JPEG", "MPO")  # decoded directly at a smaller size; MPO is a JPEG with several
ORIENTATION_TAG = 0x0112
WHITE = (255, 255, 255, 255)
TRANSPARENT = ("RGBA", "LA", "PA", "La", "RGBa")
NATIVE = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}  # modes whose channels can be chosen, and how many


def upright_size(image: PILImage.Image) -> tuple[int, int]:
    """`(height, width)` of a picture that is open but not decoded, after the EXIF orientation."""
    width, height = image.size
    if image.format == "TIFF":  # Pillow has turned it already
        return height, width
    sideways = image.getexif().get(ORIENTATION_TAG, 1) in (5, 6, 7, 8)  # turned by a quarter
    return (width, height) if sideways else (height, width)


def is_transparent(image: PILImage.Image) -> bool:
    """Whether a picture has pixels, or may have, that are laid on white."""
    return image.mode in TRANSPARENT or "transparency" in image.info


def is_grey(image: PILImage.Image) -> bool:
    """Whether a picture has one channel of 8 bits or 1, and nothing else."""
    return image.mode in ("L", "1") and not is_transparent(image)


def to_rgb(image: PILImage.Image) -> PILImage.Image:
    """Any 8-bit Pillow mode to RGB.

    Transparent pixels are laid on white; CMYK, YCbCr, palette and bilevel pictures go through
    Pillow's own conversion.

    Raises:
        ValueError: Pillow knows no way from this mode to RGB (Lab, for example), or it has more
            than 8 bits.
    """
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        raise ValueError(f"mode {image.mode} has more than 8 bits a channel")
    if is_transparent(image):
        translucent = image.convert("RGBA")
        white = Image.new("RGBA", translucent.size, WHITE)
        return Image.alpha_composite(white, translucent).convert("RGB")
    return image.convert("RGB")


def decoded(image: PILImage.Image, shrink: float = 1.0) -> PILImage.Image:
    """A picture that is open, decoded and upright, in its own mode.

    Args:
        image: of an animation, the first frame.
        shrink: how many times smaller the picture will be used. A JPEG is then decoded directly at
            1/2, 1/4 or 1/8 of its size, the smallest that is still at least `size / shrink`;
            other formats ignore it.

    Raises:
        OSError, ValueError, SyntaxError: the file cannot be decoded.
    """
    from PIL import ImageOps

    if shrink >= 2:
        width, height = image.size
        image.draft(None, (int(width / shrink), int(height / shrink)))
    image.load()
    return ImageOps.exif_transpose(image)


def read_picture(file: Path | BinaryIO) -> PILImage.Image:
    """An 8-bit picture as an upright RGB image.

    Raises:
        OSError, ValueError, SyntaxError: the file cannot be decoded.
        PIL.Image.DecompressionBombError: it claims an absurd number of pixels.
    """
    from PIL import Image

    with Image.open(file, formats=FORMATS) as image:
        return to_rgb(decoded(image))


def pillow_values(image: PILImage.Image, every_band: bool) -> np.ndarray:
    """`[C, h, w]`: one channel of a grey picture, three of others; as stored if `every_band`.

    More than 8 bits, which few formats give, stay as they are.
    """
    if image.mode.startswith("I") or image.mode == "F":
        wide = image.mode.startswith("I;16")
        return np.array(image).astype(np.uint16 if wide else image_dtype(image.mode))[None]
    if image.mode == "1" and not is_transparent(image):
        image = image.convert("L")
    if every_band and image.mode in NATIVE:
        values = np.array(image)
    else:
        values = np.array(image if is_grey(image) else to_rgb(image))
    return values[None] if values.ndim == 2 else np.moveaxis(values, -1, 0)


def pillow_channels(image: PILImage.Image, every_band: bool) -> int:
    """How many channels `pillow_values` gives."""
    if image.mode.startswith("I") or image.mode == "F" or is_grey(image):
        return 1
    return NATIVE.get(image.mode, 3) if every_band else 3


def image_dtype(mode: str) -> np.dtype:
    """The dtype that `pillow_values` gives to pictures of a Pillow mode."""
    if mode.startswith("I;16"):
        return np.dtype(np.uint16)
    return np.dtype({"I": np.int32, "F": np.float32}.get(mode, np.uint8))


def decoding_errors() -> tuple[type[Exception], ...]:
    """The errors that Pillow raises for broken files; each format has its own."""
    import struct

    from PIL import Image

    lookups = (IndexError, KeyError)
    values = (ValueError, TypeError, SyntaxError, EOFError, RuntimeError, struct.error)
    return (OSError, MemoryError, Image.DecompressionBombError, *lookups, *values)


def pillow_reason(error: Exception, path: Path | None = None) -> str:
    """What went wrong, in one line without the path of the file."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "not a picture that Pillow knows"
    text = str(error) if path is None else str(error).replace(str(path), "")
    text = text.strip(" :'\"") or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):
        text += "; --max_pixels allows more"
    return text.splitlines()[0]
