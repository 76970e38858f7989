"""Picture files read by Pillow: any mode to RGB, upright, decoded no larger than needed."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from torch import Tensor

from convmae.data.crops import resized_crop
from convmae.data.errors import UnreadableError

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image as PILImage

    from convmae.data.crops import Box, PickBox, Size

JPEG = {".jpg", ".jpeg", ".jpe", ".jfif"}
NETPBM = {".ppm", ".pgm", ".pbm", ".pnm"}
EXTENSIONS = JPEG | NETPBM | {".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".tga"}
EXTENSIONS |= {".jp2", ".avif"}
ORIENTATION_TAG = 0x0112
WHITE = (255, 255, 255, 255)


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
        translucent = image.convert("RGBA")
        white = Image.new("RGBA", translucent.size, WHITE)
        return Image.alpha_composite(white, translucent).convert("RGB")
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
        upright.format = image.format  # `exif_transpose` may return a copy without it
        return to_rgb(upright)


class EncodedPicture:
    """A picture file, on disk or in memory, decoded when it is used to uint8 RGB.

    Args:
        file: a path, or the contents of a file.
        formats: Pillow's names of the formats to try; all if None.
    """

    def __init__(self, file: Path | bytes, formats: tuple[str, ...] | None = None) -> None:
        self.file, self.formats = file, formats

    def _open(self) -> Path | BinaryIO:
        return io.BytesIO(self.file) if isinstance(self.file, bytes) else self.file

    def _unreadable(self, error: Exception) -> UnreadableError:
        return UnreadableError(_reason(error, None if isinstance(self.file, bytes) else self.file))

    def load(self) -> Tensor:
        """The whole picture, uint8 `[3, h, w]`.

        Raises:
            UnreadableError: the file cannot be decoded.
        """
        try:
            return _rgb_tensor(read_picture(self._open(), formats=self.formats))
        except _decoding_errors() as error:
            raise self._unreadable(error) from error

    def crop(self, pick: PickBox, size: Size) -> Tensor:
        """`resize(picture[pick(h, w)], size)`, uint8 `[3, H, W]`; a JPEG is decoded small.

        Raises:
            UnreadableError: the file cannot be decoded.
        """
        from PIL import Image

        try:
            with Image.open(self._open(), formats=self.formats) as header:
                full_height, full_width = upright_size(header)
            box = pick(full_height, full_width)
            shrink = min(box[2] / size[0], box[3] / size[1])
            image = _rgb_tensor(read_picture(self._open(), shrink, self.formats))
        except _decoding_errors() as error:
            raise self._unreadable(error) from error
        return resized_crop(image, _scaled_box(box, full_height / image.shape[1], image), size)


def _rgb_tensor(picture: PILImage.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _scaled_box(box: Box, factor: float, image: Tensor) -> Box:
    """`box` on a picture that was decoded `factor` times smaller, kept inside it."""
    top, left, height, width = (int(value / factor) for value in box)
    top, left = min(top, image.shape[1] - 1), min(left, image.shape[2] - 1)
    height = max(1, min(height, image.shape[1] - top))
    return top, left, height, max(1, min(width, image.shape[2] - left))


def why_unreadable(path: Path) -> str | None:
    """Why Pillow cannot open a file, None if it can; no pixels are decoded."""
    from PIL import Image

    try:
        if path.stat().st_size == 0:
            return "the file is empty"
        with Image.open(path) as image:
            image.verify()
    except _decoding_errors() as error:
        return _reason(error, path)
    return None


def _decoding_errors() -> tuple[type[Exception], ...]:
    """The errors that Pillow raises for broken files; each format has its own."""
    import struct

    from PIL import Image

    lookups = (IndexError, KeyError)
    values = (ValueError, TypeError, SyntaxError, EOFError, struct.error)
    return (OSError, MemoryError, Image.DecompressionBombError, *lookups, *values)


def _reason(error: Exception, path: Path | None = None) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "not a picture that Pillow knows"
    text = str(error) if path is None else str(error).replace(str(path), "")
    text = text.strip(" :'\"") or type(error).__name__
    return text.splitlines()[0]
