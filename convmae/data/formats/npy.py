"""The contents of one `.npy` file: which axes are what, and one picture of it."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from convmae.data.errors import UnreadableError
from convmae.data.formats.npy_header import ARRAY_ERRORS, check_header
from convmae.data.formats.stored import Kind, Stored, check_pixels, picture_kind

if TYPE_CHECKING:
    from pathlib import Path

    from convmae.config.data import ReadOptions

FEW = 4  # an axis of a single picture that is no longer can be its channels
FEW_OF_MANY = 16  # in [N, ...] arrays, which can be read in two ways alone
MEANINGS = {
    "hw": "one picture [H, W] of one channel",
    "hwc": "one picture [H, W, C] of {2} channels",
    "chw": "one picture [C, H, W] of {0} channels",
    "nhw": "{0} pictures [N, H, W] of one channel",
    "nhwc": "{0} pictures [N, H, W, C] of {3} channels",
    "nchw": "{0} pictures [N, C, H, W] of {1} channels",
}


class ArrayLayout(NamedTuple):
    """What one array holds."""

    layout: str
    """Its axes: one of hw, hwc, chw, nhw, nhwc, nchw."""
    pictures: int
    height: int
    width: int
    kind: Kind

    @property
    def many(self) -> bool:
        """Whether the first axis counts pictures."""
        return self.layout.startswith("n")


def array_layout(array: np.ndarray, reading: ReadOptions) -> ArrayLayout:
    """How an array holds pictures, by `--layout` or, if that is auto, by its shape alone.

    `[H, W]` is one channel. An array of three axes is a picture with channels, if exactly one of
    its first and last axis is 1 to 4 long and the others are longer. One of four axes is many
    pictures, if exactly one of its second and last axis is 1 to 16 long and the others of a picture
    are longer. Everything else can be read in several ways and is refused.

    Raises:
        UnreadableError: no picture has this shape or dtype, the shape can be read in several ways,
            or the picture does not have the bands or size that are asked for.
    """
    shape = array.shape
    if array.ndim not in (2, 3, 4) or 0 in shape:
        raise UnreadableError(
            f"an array of shape {list(shape)}; expected [H, W], [H, W, C], [C, H, W] or [N, ...]"
        )
    if array.dtype.kind not in "iuf":
        raise UnreadableError(f"an array of {array.dtype}; expected whole or real numbers")
    layout = reading.layout or "auto"
    if layout == "auto":
        layout = _only_layout(shape)
    elif len(layout) != array.ndim:
        raise UnreadableError(
            f"an array of shape {list(shape)} does not have the axes of --layout {layout}"
        )
    sizes = dict(zip(layout, shape, strict=True))
    kind = picture_kind(sizes.get("c", 1), array.dtype, reading)
    check_pixels(sizes["h"], sizes["w"], reading)
    return ArrayLayout(layout, sizes.get("n", 1), sizes["h"], sizes["w"], kind)


def _only_layout(shape: tuple[int, ...]) -> str:
    """The one layout that a shape can have.

    Raises:
        UnreadableError: it can have several; the message says what each would mean.
    """
    if len(shape) == 2:
        return "hw"
    limit = FEW if len(shape) == 3 else FEW_OF_MANY
    names = ("chw", "hwc") if len(shape) == 3 else ("nchw", "nhwc")
    first, middle, last = shape[-3:]
    if min(middle, max(first, last)) > limit:
        if first <= limit:
            return names[0]
        if last <= limit:
            return names[1]
    choices = (name for name in MEANINGS if len(name) == len(shape))
    means = "; ".join(f"--layout {name}: {MEANINGS[name].format(*shape)}" for name in choices)
    raise UnreadableError(
        f"an array of shape {list(shape)} can be read in several ways; choose one: {means}"
    )


def open_array(path: Path) -> np.ndarray:
    """The array of a file, memory-mapped; nothing is ever unpickled.

    Raises:
        UnreadableError: not a whole `.npy` file of numbers.
    """
    try:
        with path.open("rb") as file:
            check_header(file, path.stat().st_size)
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ARRAY_ERRORS as error:
        raise UnreadableError(_reason(error)) from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise UnreadableError("an .npz archive; expected a single .npy array")
    return array


def read_array(content: bytes) -> np.ndarray:
    """The array in the contents of a `.npy` file; nothing is ever unpickled.

    Raises:
        UnreadableError: not a whole `.npy` file of numbers.
    """
    try:
        file = io.BytesIO(content)
        check_header(file, len(content))
        array = np.load(file, allow_pickle=False)
    except ARRAY_ERRORS as error:
        raise UnreadableError(_reason(error)) from error
    if not isinstance(array, np.ndarray):
        raise UnreadableError("an .npz archive; expected a single .npy array")
    return array


def single_picture(array: np.ndarray, reading: ReadOptions) -> ArrayLayout:
    """`array_layout` of an array that must hold one picture.

    Raises:
        UnreadableError: it holds many, or see `array_layout`.
    """
    layout = array_layout(array, reading)
    if layout.many:
        raise UnreadableError(f"an array of shape {list(array.shape)}; expected a single picture")
    return layout


def stored_array(picture: np.ndarray, layout: str) -> Stored:
    """One picture of an array, whose layout is `layout`: `[C, h, w]`, not copied."""
    if layout in ("hw", "nhw"):
        picture = picture[None]
    elif layout.endswith("c"):
        picture = np.moveaxis(picture, -1, 0)
    return Stored(picture)


def _reason(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"not a .npy array of numbers: {lines[0] if lines else type(error).__name__}"
