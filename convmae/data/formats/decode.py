"""The one reader of picture files, on disk and in shards: the content decides, not the name."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from convmae.config.data import MAX_PIXELS, ReadOptions
from convmae.data.crops import resized_crop
from convmae.data.errors import UnreadableError
from convmae.data.formats.deep import HEADER_BYTES, DeepHeader, deep_header, read_deep
from convmae.data.formats.npy import read_array, single_picture, stored_array
from convmae.data.formats.npy_header import MAGIC
from convmae.data.formats.pillow import (
    FORMATS,
    ORIENTATION_TAG,
    SHRINKING,
    decoded,
    decoding_errors,
    image_dtype,
    is_grey,
    is_transparent,
    pillow_channels,
    pillow_reason,
    pillow_values,
    upright_size,
)
from convmae.data.formats.stored import Kind, Stored, check_pixels, finish, picture_kind
from convmae.data.formats.tiff import MAGICS, TiffHeader, read_tiff, read_tiff_header, upright

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image as PILImage
    from torch import Tensor

    from convmae.data.crops import Box, PickBox, Size

AS_USUAL = ReadOptions()
EXIF_MARKS = (b"eXIf", b"XML:com.adobe.xmp")  # chunks of a PNG that can hold an orientation


class Header(NamedTuple):
    """What a file says of its picture before its pixels are decoded."""

    kind: Kind
    notes: tuple[str, ...] = ()
    """What is done to it that its owner may not expect, in words that are counted."""


class EncodedPicture:
    """A picture file, on disk or in memory, decoded when it is used.

    Args:
        file: a path, or the contents of a file.
        reading: how it is read.
    """

    def __init__(self, file: Path | bytes, reading: ReadOptions = AS_USUAL) -> None:
        self.file, self.reading = file, reading

    def header(self) -> Header:
        """What it is, without decoding its pixels.

        Raises:
            UnreadableError: the file is broken, or not as it is asked for.
        """
        head = self._head()
        if not head:
            raise UnreadableError("the file is empty")
        if head.startswith(MAGIC):
            return Header(single_picture(read_array(self._content()), self.reading).kind)
        tiff, deep = self._tiff(head), deep_header(head)
        if tiff is not None and not tiff.plain:
            photo = tiff.dtype in (np.uint8, np.bool_) and tiff.channels == 1
            kind = picture_kind(tiff.channels, tiff.dtype, self.reading, photo, tiff.alpha)
            return Header(kind, _notes(photo, tiff.alpha, False, tiff.nodata, self.reading))
        if deep is not None:
            check_pixels(deep.height, deep.width, self.reading)
            dtype = np.dtype(np.uint16)
            kind = picture_kind(deep.channels, dtype, self.reading, alpha=deep.alpha)
            return Header(kind, _notes(False, deep.alpha, False, None, self.reading))
        return self._pillow_header(None if tiff is None else tiff.nodata)

    def size(self) -> Size:
        """`(height, width)`, upright, without decoding its pixels where the format allows that.

        Raises:
            UnreadableError: the file is broken, or not as it is asked for.
        """
        head = self._head()
        if head.startswith(MAGIC):
            layout = single_picture(read_array(self._content()), self.reading)
            return layout.height, layout.width
        tiff = self._tiff(head)
        if tiff is not None and not tiff.plain:
            return tiff.height, tiff.width
        try:
            with self.opened() as image:
                return upright_size(image)
        except decoding_errors() as error:
            raise self.unreadable(error) from error

    def load(self) -> Tensor:
        """The whole picture, `[C, h, w]`.

        Raises:
            UnreadableError: the file cannot be decoded.
        """
        return finish(self._stored(), self.reading)

    def measured(self) -> Tensor:
        """`load` in float32, with NaN where there are no data.

        Raises:
            UnreadableError: the file cannot be decoded.
        """
        return finish(self._stored(), self.reading, measure=True)

    def crop(self, pick: PickBox, size: Size) -> Tensor:
        """`resize(picture[pick(h, w)], size)`, `[C, H, W]`; a JPEG is decoded small.

        Raises:
            UnreadableError: the file cannot be decoded.
        """
        small = self._small_jpeg(pick, size) if self.reading.nodata is None else None
        if small is None:
            image = self.load()
            return resized_crop(image, pick(*image.shape[1:]), size)
        box, image = small
        return resized_crop(image, box, size)

    # -- formats ----------------------------------------------------------------------------------

    def _stored(self) -> Stored:
        """The values of the whole picture, upright."""
        head = self._head()
        if head.startswith(MAGIC):
            array = read_array(self._content())
            return stored_array(array, single_picture(array, self.reading).layout)
        tiff, deep = self._tiff(head), deep_header(head)
        if tiff is not None and not tiff.plain:
            return read_tiff(self.file, self.reading)
        if deep is not None:
            return self._deep(deep)
        stored = self._from_pillow(1.0)
        stored.nodata = None if tiff is None else tiff.nodata
        return stored

    def _deep(self, header: DeepHeader) -> Stored:
        check_pixels(header.height, header.width, self.reading)
        content = self._content()
        stored = read_deep(content, header)
        if header.format == "png" and any(mark in content for mark in EXIF_MARKS):
            with self.opened() as image:
                image.load()  # what stands after the pixels counts as well
                stored.values = upright(stored.values, image.getexif().get(ORIENTATION_TAG, 1))
        return stored

    def _from_pillow(self, shrink: float) -> Stored:
        every_band = self.reading.bands is not None
        try:
            with self.opened() as image:
                values = pillow_values(decoded(image, shrink), every_band)
        except decoding_errors() as error:
            raise self.unreadable(error) from error
        return Stored(values, photo=values.dtype == np.uint8 and not every_band)

    def _small_jpeg(self, pick: PickBox, size: Size) -> tuple[Box, Tensor] | None:
        """A JPEG decoded as small as `size` allows, and the box of it; None for other formats."""
        if not self._head().startswith(b"\xff\xd8"):
            return None
        try:
            with self.opened() as header:
                if header.format not in SHRINKING:
                    return None
                full = upright_size(header)
        except decoding_errors() as error:
            raise self.unreadable(error) from error
        box = pick(*full)
        shrink = min(box[2] / size[0], box[3] / size[1])
        image = finish(self._from_pillow(shrink), self.reading)
        return _scaled_box(box, full[0] / image.shape[1], image), image

    def _pillow_header(self, nodata: float | None) -> Header:
        every_band = self.reading.bands is not None
        try:
            with self.opened() as image:
                dtype = image_dtype(image.mode)
                channels = pillow_channels(image, every_band)
                photo = dtype == np.uint8 and not every_band
                kind = picture_kind(channels, dtype, self.reading, photo)
                grey = is_grey(image)
                moving = getattr(image, "is_animated", False) and image.format != "MPO"
                notes = _notes(grey, is_transparent(image), moving, nodata, self.reading)
                image.verify()
        except decoding_errors() as error:
            raise self.unreadable(error) from error
        return Header(kind, notes)

    # -- the file ---------------------------------------------------------------------------------

    def _head(self) -> bytes:
        if isinstance(self.file, bytes):
            return self.file[:HEADER_BYTES]
        try:
            with open(self.file, "rb") as opened:
                return opened.read(HEADER_BYTES)
        except OSError as error:
            raise self.unreadable(error) from error

    def _content(self) -> bytes:
        if isinstance(self.file, bytes):
            return self.file
        try:
            return self.file.read_bytes()
        except OSError as error:
            raise self.unreadable(error) from error

    def _tiff(self, head: bytes) -> TiffHeader | None:
        return read_tiff_header(self.file, self.reading) if head.startswith(MAGICS) else None

    def opened(self) -> PILImage.Image:
        """Opened by Pillow, not decoded.

        Raises:
            UnreadableError: it has more pixels than `--max_pixels`.
        """
        from PIL import Image

        limit = self.reading.pixel_limit
        if limit > MAX_PIXELS and Image.MAX_IMAGE_PIXELS is not None:
            # Pillow refuses twice this many, whoever asks; it is only ever raised.
            Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, limit)
        file = io.BytesIO(self.file) if isinstance(self.file, bytes) else self.file
        image = Image.open(file, formats=FORMATS)
        check_pixels(image.height, image.width, self.reading)
        return image

    def unreadable(self, error: Exception) -> UnreadableError:
        """What Pillow says of a broken file, in one line."""
        return UnreadableError(
            pillow_reason(error, None if isinstance(self.file, bytes) else self.file)
        )


def _notes(
    grey: bool, transparent: bool, moving: bool, nodata: float | None, reading: ReadOptions
) -> tuple[str, ...]:
    notes = []
    if grey and reading.bands is None:
        notes.append(GREY)
    if transparent and reading.bands is None:
        notes.append("with transparency, laid on white")
    if moving:
        notes.append("animations, of which the first picture is read")
    if nodata is not None and reading.nodata is None:
        notes.append(f"with nodata {nodata:g} in GDAL's tag")
    return tuple(notes)


GREY = "in 8-bit grey"


def _scaled_box(box: Box, factor: float, image: Tensor) -> Box:
    """`box` on a picture that was decoded `factor` times smaller, kept inside it."""
    top, left, height, width = (int(value / factor) for value in box)
    top, left = min(top, image.shape[1] - 1), min(left, image.shape[2] - 1)
    height = max(1, min(height, image.shape[1] - top))
    return top, left, height, max(1, min(width, image.shape[2] - left))
