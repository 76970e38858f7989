"""`.npy` files: pictures of any number of channels, in 8 or 16 bits or in float32."""

from __future__ import annotations

import io
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from convmae.data.crops import resized_crop
from convmae.data.errors import DataError, Failure, UnreadableError
from convmae.data.folder import check_readable
from convmae.data.npy import ARRAY_ERRORS, check_header
from convmae.data.picture import NO_LABEL, Pixels

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from convmae.data.crops import Box, PickBox, Size

ARRAY_EXTENSION = ".npy"
DTYPES = {  # from the dtype of the file to that of the tensor
    np.dtype(np.uint8): torch.uint8,
    np.dtype(np.uint16): torch.uint16,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float32,
}


class ArrayLayout(NamedTuple):
    """What one array holds: `pictures` pictures of `channels` channels."""

    pictures: int
    channels: int
    dtype: torch.dtype
    channels_last: bool


def array_layout(array: np.ndarray) -> ArrayLayout:
    """How an array holds pictures.

    `[H, W]` is one channel. Of `[H, W, C]` and `[C, H, W]` the channels are the smaller of the
    first and last axis, the last if both are the same. `[N, ...]` holds many pictures.

    Raises:
        UnreadableError: no picture has this shape or dtype.
    """
    shape = array.shape
    if array.ndim not in (2, 3, 4) or 0 in shape:
        raise UnreadableError(
            f"an array of shape {list(shape)}; expected [H, W], [H, W, C], [C, H, W] or [N, ...]"
        )
    dtype = DTYPES.get(array.dtype.newbyteorder("="))
    if dtype is None:
        raise UnreadableError(
            f"an array of {array.dtype}; expected uint8, uint16, float32 or float64"
        )
    if array.ndim == 2:
        return ArrayLayout(1, 1, dtype, True)
    first, last = shape[-3], shape[-1]
    count = shape[0] if array.ndim == 4 else 1
    return ArrayLayout(count, min(first, last), dtype, last <= first)


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


def decode_array(content: bytes) -> Pixels:
    """One picture from the contents of a `.npy` file; nothing is ever unpickled.

    Raises:
        UnreadableError: not a whole `.npy` file of numbers, or not one picture.
    """
    try:
        file = io.BytesIO(content)
        check_header(file, len(content))
        array = np.load(file, allow_pickle=False)
    except ARRAY_ERRORS as error:
        raise UnreadableError(_reason(error)) from error
    if not isinstance(array, np.ndarray):
        raise UnreadableError("an .npz archive; expected a single .npy array")
    layout = array_layout(array)
    if array.ndim == 4:
        raise UnreadableError(f"an array of shape {list(array.shape)}; expected a single picture")
    return Pixels(_picture_tensor(array, layout))


def _reason(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"not a .npy array of numbers: {lines[0] if lines else type(error).__name__}"


def _picture_tensor(picture: np.ndarray, layout: ArrayLayout, box: Box | None = None) -> Tensor:
    """The box of one picture as `[C, h, w]`, copied, in the machine's byte order.

    Raises:
        UnreadableError: a float picture holds NaN or an infinity.
    """
    if picture.ndim == 2:
        picture = picture[..., None]
    if layout.channels_last:
        picture = np.moveaxis(picture, -1, 0)
    if box is not None:
        top, left, height, width = box
        picture = picture[:, top : top + height, left : left + width]
    wanted: Any = next(stored for stored, dtype in DTYPES.items() if dtype == layout.dtype)
    values = np.array(picture, dtype=wanted, order="C")
    if layout.dtype == torch.float32 and not np.isfinite(values).all():
        raise UnreadableError("the picture holds NaN or infinite values")
    return torch.from_numpy(values)


class ArrayPhotos:
    """Pictures in `.npy` files, of which only the part that is needed is read.

    Args:
        paths: the files.
        labels: of each file; -1 if None.

    Attributes:
        failures: the files that cannot be used: broken, or not of the same channels and dtype as
            the first that can be read. A failed file counts as one picture.

    Raises:
        DataError: not one of the files can be read.
    """

    def __init__(self, paths: Sequence[Path], labels: Sequence[int] | None = None) -> None:
        self.paths = list(paths)
        self.labels = None if labels is None else list(labels)
        first = next((found for path in self.paths if (found := _try_layout(path))), None)
        if first is None:
            failures, _ = check_readable(self.paths[:5], self._why_unreadable)
            examples = "; ".join(f"{name}: {reason}" for name, reason in failures)
            raise DataError(
                f"none of the {len(self.paths)} arrays can be read. The first: {examples}"
            )
        self.channels, self.dtype = first.channels, first.dtype
        with ThreadPoolExecutor(8) as pool:
            counts = list(pool.map(self._count, self.paths))
        self.failures = [count for count in counts if isinstance(count, Failure)]
        self._ends = list(accumulate(1 if isinstance(c, Failure) else c for c in counts))

    def _count(self, path: Path) -> int | Failure:
        try:
            return self._open_checked(path)[1].pictures
        except UnreadableError as error:
            return Failure(str(path), str(error))

    def _open_checked(self, path: Path) -> tuple[np.ndarray, ArrayLayout]:
        array = open_array(path)
        layout = array_layout(array)
        if (layout.channels, layout.dtype) != (self.channels, self.dtype):
            raise UnreadableError(
                f"{layout.channels} channels of {_dtype_name(layout.dtype)}, where other pictures "
                f"have {self.channels} of {_dtype_name(self.dtype)}"
            )
        return array, layout

    def _why_unreadable(self, path: Path) -> str | None:
        try:
            array_layout(open_array(path))
        except UnreadableError as error:
            return str(error)
        return None

    def __len__(self) -> int:
        return self._ends[-1]

    def _locate(self, index: int) -> tuple[int, int]:
        """The file of picture `index`, and the picture's place in it."""
        file = bisect_right(self._ends, index)
        return file, index - (self._ends[file - 1] if file else 0)

    def name(self, index: int) -> str:
        """The path, and the place in the file where it holds many pictures."""
        file, place = self._locate(index)
        start = self._ends[file - 1] if file else 0
        many = self._ends[file] - start > 1
        return f"{self.paths[file]}[{place}]" if many else str(self.paths[file])

    def label(self, index: int) -> int:
        return NO_LABEL if self.labels is None else self.labels[self._locate(index)[0]]

    def _stored_picture(self, index: int) -> tuple[np.ndarray, ArrayLayout]:
        file, place = self._locate(index)
        array, layout = self._open_checked(self.paths[file])
        if array.ndim < 4:
            return array, layout
        if place >= len(array):
            raise UnreadableError(f"the file holds {len(array)} pictures now, fewer than before")
        return array[place], layout

    def load(self, index: int) -> Tensor:
        """The whole picture, `[C, h, w]`.

        Raises:
            UnreadableError: the file cannot be read, or differs from the others.
        """
        return _picture_tensor(*self._stored_picture(index))

    def crop(self, index: int, pick: PickBox, size: Size) -> Tensor:
        """`resize(picture[pick(h, w)], size)`, `[C, H, W]`.

        Raises:
            UnreadableError: the file cannot be read, or differs from the others.
        """
        picture, layout = self._stored_picture(index)
        channels_last = picture.ndim == 2 or layout.channels_last
        height, width = picture.shape[:2] if channels_last else picture.shape[1:]
        image = _picture_tensor(picture, layout, pick(height, width))
        return resized_crop(image, (0, 0, *image.shape[1:]), size)


def _try_layout(path: Path) -> ArrayLayout | None:
    try:
        return array_layout(open_array(path))
    except UnreadableError:
        return None


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
