"""From the values in a file to a picture: bands, pixels without data, number types, channels.

Every format ends here, so that a picture is the same whatever file it came in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from convmae.data.errors import UnreadableError

if TYPE_CHECKING:
    from torch import Tensor

    from convmae.config.data import ReadOptions

EXACT = 2**24  # float32 holds every whole number up to this one
COLOURS = (1, 3)  # channels that a photograph can have besides transparency
# What programs write where there are no data.
USUAL_NODATA = (-9999.0, -99999.0, -999999.0, -32768.0, -32767.0, -999.0, -1e20, 1e20)
ABSURD = 1e30  # no measured quantity is that large: the lowest float32 and its like


class Kind(NamedTuple):
    """What the pictures of a data set have in common."""

    channels: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.channels} of {str(self.dtype).removeprefix('torch.')}"

    @property
    def words(self) -> str:
        """ "3 channels of uint8"."""
        noun = "channel" if self.channels == 1 else "channels"
        return f"{self.channels} {noun} of {str(self.dtype).removeprefix('torch.')}"


@dataclass
class Stored:
    """The values of a file, upright.

    Attributes:
        values: `[C, h, w]`.
        nodata: the value that the file itself gives to pixels without data.
        largest: the value of black, where 0 is white; None where 0 is black.
        alpha: the channel that is transparency.
        premultiplied: whether the others have been multiplied by it.
        photo: whether grey and RGB mean the same picture, as in 8-bit photographs.
    """

    values: np.ndarray
    nodata: float | None = None
    largest: int | None = None
    alpha: int | None = None
    premultiplied: bool = False
    photo: bool = False


def stored_dtype(dtype: np.dtype) -> torch.dtype:
    """The dtype that pictures have of values of `dtype`: uint8, uint16, else float32.

    Raises:
        UnreadableError: these are no real numbers.
    """
    if dtype.kind == "b" or dtype.newbyteorder("=") == np.uint8:
        return torch.uint8
    if dtype.newbyteorder("=") == np.uint16:
        return torch.uint16
    if dtype.kind not in "iuf":
        raise UnreadableError(f"values of {dtype}; expected whole or real numbers")
    return torch.float32


def picture_kind(
    channels: int, dtype: np.dtype, reading: ReadOptions, photo: bool = False, alpha: bool = False
) -> Kind:
    """Channels and dtype that `finish` gives to values of `channels` and `dtype`.

    Args:
        channels: that the file has, transparency included.
        dtype: of the file.
        reading: how it is read.
        photo, alpha: see `Stored`.

    Raises:
        UnreadableError: the file has no such bands, or another number of channels than asked for.
    """
    result = stored_dtype(dtype)
    if reading.bands is not None:
        if max(reading.bands) > channels:
            asked = " ".join(map(str, reading.bands))
            raise UnreadableError(f"the file has {channels} bands, but --bands asks for {asked}")
        return Kind(len(reading.bands), result)
    colours = channels - alpha
    if alpha and (colours not in COLOURS or result == torch.float32):
        raise UnreadableError(
            f"{colours} bands of {dtype} with transparency, which can be laid on white for 1 or 3 "
            f"bands of 8 or 16 bits; --bands chooses bands without it"
        )
    wanted = (3 if photo else colours) if reading.in_chans is None else reading.in_chans
    repeated = colours == 1 and wanted == 3
    if wanted != colours and not repeated and not (photo and wanted == 1):
        raise UnreadableError(
            f"the file has {colours} channel{'s' * (colours > 1)} of {dtype}, but --in_chans is "
            f"{wanted}; --bands chooses bands"
        )
    return Kind(wanted, result)


def check_pixels(height: int, width: int, reading: ReadOptions) -> None:
    """Raises `UnreadableError` where a picture is larger than `--max_pixels`."""
    if height * width > reading.pixel_limit:
        raise UnreadableError(
            f"{height} x {width} pixels are {height * width}, more than --max_pixels "
            f"{reading.pixel_limit} allows"
        )


def finish(stored: Stored, reading: ReadOptions, measure: bool = False) -> Tensor:
    """The picture `[C, h, w]`, uint8, uint16 or float32.

    A pixel without data gets the mean of the picture's other pixels of its band. A float picture
    that has pixels without data may have NaN too, which count as such.

    Args:
        stored: what the file holds.
        reading: how it is read.
        measure: float32 with NaN where there are no data, instead of the mean.

    Raises:
        UnreadableError: not such bands, values that float32 cannot hold, values that are not
            finite, or a band without any data.
    """
    channels, dtype = picture_kind(
        len(stored.values), stored.values.dtype, reading, stored.photo, stored.alpha is not None
    )
    values, alpha = stored.values, None
    if reading.bands is not None:
        values = values[[band - 1 for band in reading.bands]]
    elif stored.alpha is not None:
        alpha = values[stored.alpha]
        values = np.delete(values, stored.alpha, axis=0)
    nodata = stored.nodata if reading.nodata is None else reading.nodata
    missing = _without_data(values, nodata)
    values = _as_dtype(values, dtype, missing, nodata)
    if stored.largest is not None:
        values = values.dtype.type(stored.largest) - values
    if alpha is not None:
        values = _on_white(values, alpha, stored.premultiplied)
    if missing is not None:
        values = _filled(values, missing)
    if channels != len(values):
        values = np.repeat(values, channels, 0) if len(values) == 1 else _grey(values)
        if missing is not None:
            missing = np.broadcast_to(missing.any(0, keepdims=True), values.shape)
    if measure:
        values = values.astype(np.float32)
        if missing is not None:
            values[missing] = np.nan
    return torch.from_numpy(values)


def _without_data(values: np.ndarray, nodata: float | None) -> np.ndarray | None:
    """Where values are `nodata` or NaN; None where they are everywhere."""
    if nodata is None:
        return None
    real = values.dtype.kind == "f"
    missing = np.isnan(values) if real else np.zeros(values.shape, dtype=bool)
    if real and not math.isnan(nodata):
        with np.errstate(over="ignore"):
            missing |= values == values.dtype.type(nodata)
    elif not real and float(nodata).is_integer():
        missing |= values == int(nodata)
    return missing if missing.any() else None


def _as_dtype(
    values: np.ndarray, dtype: torch.dtype, missing: np.ndarray | None, nodata: float | None
) -> np.ndarray:
    """`values` in the machine's byte order, as `stored_dtype` says.

    Raises:
        UnreadableError: float32 cannot hold them, or they are not finite.
    """
    if values.dtype.kind == "b":
        return values.astype(np.uint8) * np.uint8(255)
    if dtype != torch.float32:
        return values.astype(values.dtype.newbyteorder("="), copy=not values.flags.writeable)
    if values.dtype.kind in "iu" and values.dtype.itemsize > 2:
        known = values if missing is None else values[~missing]
        if known.size and (int(known.max()) > EXACT or int(known.min()) < -EXACT):
            raise UnreadableError(
                f"values of {values.dtype} from {known.min()} to {known.max()}; float32, in which "
                f"they are kept, holds whole numbers up to {EXACT} exactly. Write them smaller, or "
                "as float32"
            )
    with np.errstate(over="ignore"):
        real = np.array(values, dtype=np.float32, order="C")
    finite = np.isfinite(real) if missing is None else np.isfinite(real) | missing
    if not finite.all():
        out = "; --nodata nan leaves NaN out" if nodata is None and np.isnan(real).any() else ""
        raise UnreadableError(f"the picture holds NaN or infinite values{out}")
    return real


def _on_white(values: np.ndarray, alpha: np.ndarray, premultiplied: bool) -> np.ndarray:
    """`values * alpha + white * (1 - alpha)`, uint8 or uint16 `[C, h, w]`."""
    white = np.iinfo(values.dtype).max
    share = alpha.astype(np.float64) / white
    seen = values if premultiplied else values * share
    return (seen + white * (1 - share)).round().clip(0, white).astype(values.dtype)


def _filled(values: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """`values` with the mean of the others of their band where they are missing.

    Raises:
        UnreadableError: a band is missing as a whole.
    """
    result = values.copy()
    for band, (channel, hole) in enumerate(zip(values, missing, strict=True)):
        if hole.all():
            raise UnreadableError(f"no pixel of band {band + 1} holds data, all are nodata")
        mean = channel[~hole].mean(dtype=np.float64)
        result[band][hole] = mean if values.dtype.kind == "f" else round(mean)
    return result


def _grey(values: np.ndarray) -> np.ndarray:
    """Pillow's grey of 8-bit RGB, `[3, h, w] -> [1, h, w]`."""
    from PIL import Image

    rgb = np.ascontiguousarray(np.moveaxis(values, 0, -1))
    return np.array(Image.fromarray(rgb).convert("L"))[None]


def suspected_nodata(image: Tensor) -> float | None:
    """A value of a float picture that most likely means "no data"; None if there is none.

    It is the smallest or largest value of a band, one that programs write for missing data (or
    beyond any measured quantity), and far outside of all other values.
    """
    if image.dtype != torch.float32:
        return None
    for band in image.flatten(1):
        for value, sign in ((band.min(), 1.0), (band.max(), -1.0)):
            number = float(value)
            if number not in USUAL_NODATA and abs(number) < ABSURD:
                continue
            others = band[band != value]
            if not len(others):
                continue
            spread = float(others.max()) - float(others.min())
            nearest = float(others.min() if sign > 0 else others.max())
            if sign * (nearest - number) > spread:
                return number
    return None
