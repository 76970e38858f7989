"""What Pillow flattens to 8 bits: PNG, netpbm and JPEG 2000 files of more bits a channel."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from convmae.data.errors import UnreadableError
from convmae.data.formats.stored import Stored

PNG = b"\x89PNG\r\n\x1a\n"
PNG_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # by the colour type
PNG_WITH_ALPHA = (4, 6)
# P2, P5: grey, P3, P6: RGB; width, height and largest value, with comments between them.
_SPACE = rb"(?:\s|#[^\n]*\n)+"
NETPBM = re.compile(rb"P([2356])" + _SPACE + rb"(\d+)" + _SPACE + rb"(\d+)" + _SPACE + rb"(\d+)\s")
CODESTREAM = b"\xff\x4f\xff\x51"  # of JPEG 2000: start, then the sizes
HEADER_BYTES = 4096  # of a file, in which all of that stands


class DeepHeader(NamedTuple):
    """Size and kind of a picture of more than 8 bits a channel."""

    height: int
    width: int
    channels: int
    alpha: bool
    format: str
    start: int = 0  # of the pixels, where the format has no other structure


def deep_header(head: bytes) -> DeepHeader | None:
    """The header of such a picture, from the first bytes of its file; None if it is another."""
    if head.startswith(PNG) and head[12:16] == b"IHDR" and head[24:25] == b"\x10":
        width, height = (int.from_bytes(head[at : at + 4], "big") for at in (16, 20))
        colour = head[25]
        channels = PNG_CHANNELS.get(colour)
        if channels is None:
            raise UnreadableError(f"a damaged PNG: colour type {colour} of 16 bits")
        return DeepHeader(height, width, channels, colour in PNG_WITH_ALPHA, "png")
    found = NETPBM.match(head)
    if found is not None and 255 < int(found[4]) < 65536:
        channels = 3 if found[1] in b"36" else 1
        text = found[1] in b"23"
        kind = "text" if text else "binary"
        return DeepHeader(int(found[3]), int(found[2]), channels, False, kind, found.end())
    return _jpeg_2000_header(head)


def _jpeg_2000_header(head: bytes) -> DeepHeader | None:
    at = head.find(CODESTREAM)
    if not (head[4:8] == b"jP  " or at == 0) or at < 0:
        return None
    size = head[at + 4 :]  # length, capabilities, then x and y of the end and of the start
    right, bottom, left, top = (int.from_bytes(size[i : i + 4], "big") for i in (4, 8, 12, 16))
    channels = int.from_bytes(size[36:38], "big")
    bits = [(size[38 + 3 * c] & 0x7F) + 1 for c in range(channels) if 38 + 3 * c < len(size)]
    if not bits or max(bits) <= 8:
        return None
    return DeepHeader(bottom - top, right - left, channels, False, "jpeg2000")


def read_deep(content: bytes, header: DeepHeader) -> Stored:
    """The values as they are stored, upright but for EXIF: `[C, h, w]`.

    Raises:
        UnreadableError: the file is damaged.
    """
    if header.format in ("text", "binary"):
        values = _read_netpbm(content, header)
    else:
        values = _read_with_codec(content, header)
    if values.ndim == 2:
        values = values[..., None]
    if values.shape != (header.height, header.width, header.channels):
        raise UnreadableError(
            f"a damaged file: pixels of shape {list(values.shape)}, where its header says "
            f"{[header.height, header.width, header.channels]}"
        )
    alpha = header.channels - 1 if header.alpha else None
    return Stored(np.ascontiguousarray(np.moveaxis(values, -1, 0)), alpha=alpha)


def _read_netpbm(content: bytes, header: DeepHeader) -> np.ndarray:
    count = header.height * header.width * header.channels
    if header.format == "text":
        try:
            values = np.array(content[header.start :].split()[:count], dtype=np.uint16)
        except (ValueError, OverflowError) as error:
            raise UnreadableError(f"a damaged file: {error}") from error
    else:
        values = np.frombuffer(content[header.start : header.start + 2 * count], ">u2")
    if len(values) < count:
        raise UnreadableError(f"cut short: {len(values)} of {count} values")
    shape = (header.height, header.width, header.channels)
    return values.astype(np.uint16).reshape(shape)


def _read_with_codec(content: bytes, header: DeepHeader) -> np.ndarray:
    try:
        import imagecodecs
    except ImportError as error:
        raise UnreadableError(
            f"a {header.format} file of more than 8 bits, which needs imagecodecs: "
            "pip install imagecodecs"
        ) from error
    decode = imagecodecs.png_decode if header.format == "png" else imagecodecs.jpeg2k_decode
    try:
        return decode(content)
    except Exception as error:  # each codec has an error of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnreadableError(f"a damaged {header.format} file: {reason}") from error
