"""`.npy` files: pictures of any number of channels, in 8 or 16 bits or in float32."""

from __future__ import annotations

from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import TYPE_CHECKING

from convmae.config.data import ReadOptions
from convmae.data.crops import resized_crop
from convmae.data.errors import DataError, Failure, UnreadableError
from convmae.data.folder import check_readable
from convmae.data.formats.npy import ArrayLayout, array_layout, open_array, stored_array
from convmae.data.formats.stored import Stored, finish
from convmae.data.picture import NO_LABEL

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from torch import Tensor

    from convmae.data.crops import PickBox, Size

ARRAY_EXTENSION = ".npy"
AS_USUAL = ReadOptions()


class ArrayPhotos:
    """Pictures in `.npy` files, of which only the part that is needed is read.

    Args:
        paths: the files.
        labels: of each file; -1 if None.
        reading: how they are read.

    Attributes:
        failures: the files that cannot be used: broken, or not of the same channels and dtype as
            the first that can be read, or with the channels on another side. A failed file counts
            as one picture.

    Raises:
        DataError: not one of the files can be read.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Sequence[int] | None = None,
        reading: ReadOptions = AS_USUAL,
    ) -> None:
        self.paths = list(paths)
        self.labels = None if labels is None else list(labels)
        self.reading = reading
        first = next((found for path in self.paths if (found := self._try_layout(path))), None)
        if first is None:
            failures, _ = check_readable(self.paths[:5], self._why_unreadable)
            examples = "; ".join(f"{name}: {reason}" for name, reason in failures)
            raise DataError(
                f"none of the {len(self.paths)} arrays can be read. The first: {examples}"
            )
        self.kind, self.layout = first.kind, first.layout
        self.channels, self.dtype = first.kind
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
        layout = array_layout(array, self.reading)
        if layout.kind != self.kind:
            raise UnreadableError(f"{layout.kind.words}, where other pictures have {self.kind}")
        if layout.layout.lstrip("n") != self.layout.lstrip("n"):
            raise UnreadableError(
                f"an array of shape {list(array.shape)}, read as {layout.layout}, where others are "
                f"{self.layout}; --layout says which all are"
            )
        return array, layout

    def _try_layout(self, path: Path) -> ArrayLayout | None:
        try:
            return array_layout(open_array(path), self.reading)
        except UnreadableError:
            return None

    def _why_unreadable(self, path: Path) -> str | None:
        try:
            array_layout(open_array(path), self.reading)
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

    def _stored(self, index: int) -> Stored:
        file, place = self._locate(index)
        array, layout = self._open_checked(self.paths[file])
        if layout.many:
            if place >= len(array):
                raise UnreadableError(
                    f"the file holds {len(array)} pictures now, fewer than before"
                )
            array = array[place]
        return stored_array(array, layout.layout)

    def load(self, index: int) -> Tensor:
        """The whole picture, `[C, h, w]`.

        Raises:
            UnreadableError: the file cannot be read, or differs from the others.
        """
        return finish(self._stored(index), self.reading)

    def measured(self, index: int) -> Tensor:
        """`load` in float32, with NaN where there are no data.

        Raises:
            UnreadableError: the file cannot be read, or differs from the others.
        """
        return finish(self._stored(index), self.reading, measure=True)

    def crop(self, index: int, pick: PickBox, size: Size) -> Tensor:
        """`resize(picture[pick(h, w)], size)`, `[C, H, W]`.

        Raises:
            UnreadableError: the file cannot be read, or differs from the others.
        """
        stored = self._stored(index)
        box = pick(*stored.values.shape[1:])
        if self.reading.nodata is not None:  # filled with the mean of the whole picture
            return resized_crop(finish(stored, self.reading), box, size)
        top, left, height, width = box
        stored.values = stored.values[:, top : top + height, left : left + width]
        return resized_crop(finish(stored, self.reading), (0, 0, height, width), size)
