"""The values of label maps: index maps, masks and pictures in the colours of a palette."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from convmae.config.data import ReadOptions
from convmae.config.label_maps import IGNORED
from convmae.data.classes import name_problem
from convmae.data.errors import DataError, UnreadableError
from convmae.data.formats.decode import EncodedPicture
from convmae.data.formats.npy import open_array

if TYPE_CHECKING:
    from convmae.config.label_maps import LabelMapConfig

WHITE = 127  # a mask is set above it
MASK_NAMES = ["background", "target"]
IGNORE_NAME = "ignore"  # of a colour that counts for nothing
COLOUR = re.compile(r"(?:#([0-9a-fA-F]{6})|(\d+)[\s,;]+(\d+)[\s,;]+(\d+))(?:[\s,;]+(.*))?")


class LabelError(UnreadableError):
    """A label map can be decoded, but does not say which class its pixels are of."""


@dataclass(frozen=True)
class Palette:
    """The colours of classes.

    Attributes:
        path: the file that they are from.
        colours: red, green and blue of each class.
        ignored: those that count for nothing.
        names: of the classes; None where the file has none.
    """

    path: str
    colours: tuple[tuple[int, int, int], ...]
    ignored: tuple[tuple[int, int, int], ...] = ()
    names: tuple[str, ...] | None = None

    @cached_property
    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """Colours as one number each, sorted, and the class of each."""
        codes = np.array([_code(*colour) for colour in (*self.colours, *self.ignored)])
        classes = [*range(len(self.colours)), *[IGNORED] * len(self.ignored)]
        order = codes.argsort()
        return codes[order], np.array(classes, dtype=np.uint8)[order]


def _code(red: int, green: int, blue: int) -> int:
    return red << 16 | green << 8 | blue


@dataclass(frozen=True)
class LabelReading:
    """What the values of label maps mean; see `LabelMapConfig`."""

    palette: Palette | None = None
    binary: bool = False
    reduce_zero: bool = False
    ignore: int = IGNORED
    pictures: ReadOptions = ReadOptions()

    @classmethod
    def of(cls, options: LabelMapConfig, reading: ReadOptions) -> LabelReading:
        """Those that the options ask for.

        Raises:
            DataError: the file of the palette cannot be used.
        """
        return cls(
            None if options.palette is None else read_palette(options.palette),
            bool(options.binary_masks),
            bool(options.reduce_zero_label),
            IGNORED if options.ignore_label is None else options.ignore_label,
            ReadOptions(max_pixels=reading.max_pixels),
        )


def read_label_map(file: Path, reading: LabelReading) -> np.ndarray:
    """The class of every pixel, uint8 `[h, w]`; 255 where it counts for nothing.

    Raises:
        LabelError: a colour that is not in the palette, or values that are no classes.
        UnreadableError: the file cannot be decoded.
    """
    values = stored_labels(file, reading)
    if reading.palette is not None:
        return _classes_of_colours(values, reading.palette)
    flat = _one_channel(values, reading.binary)
    if reading.binary:
        return (flat > (0 if flat.dtype == np.bool_ else WHITE)).astype(np.uint8)
    if flat.dtype.kind == "f" and not np.array_equal(flat, np.trunc(flat)):
        raise LabelError("its values are no whole numbers")
    numbers = flat.astype(np.int64)
    kept = numbers != reading.ignore
    if reading.reduce_zero:
        kept &= numbers != 0
        numbers = numbers - 1
    if not kept.all():
        numbers = np.where(kept, numbers, IGNORED)
    wrong = kept & ((numbers < 0) | (numbers >= IGNORED))
    if wrong.any():
        value = flat[wrong].flat[0]
        raise LabelError(
            f"it has the value {value}; expected classes from 0 to {IGNORED - 1}, or "
            f"{reading.ignore} for what is ignored (--ignore_label)"
        )
    return numbers.astype(np.uint8)


def stored_labels(file: Path, reading: LabelReading) -> np.ndarray:
    """The values of a file, `[h, w]` or `[h, w, C]`: the indices of a picture with a palette.

    With a palette of the project red, green and blue, `[h, w, 3]`.
    """
    if file.suffix.lower() == ".npy":
        return np.asarray(open_array(file))
    from convmae.data.formats.pillow import decoded, decoding_errors

    picture = EncodedPicture(file, reading.pictures)
    try:
        with picture.opened() as image:
            upright = decoded(image)
            if reading.palette is not None:
                upright = upright.convert("RGB")
            return np.array(upright)
    except decoding_errors() as error:
        raise picture.unreadable(error) from error


def _one_channel(values: np.ndarray, binary: bool) -> np.ndarray:
    """`[h, w]`; of several channels the first, where the others say the same."""
    if values.ndim == 2:
        return values
    if values.ndim != 3 or values.shape[2] not in (1, 2, 3, 4):
        raise LabelError(f"an array of shape {list(values.shape)}; expected [height, width]")
    colours = values[..., : 3 if values.shape[2] >= 3 else 1]
    if binary or (colours == colours[..., :1]).all():
        return colours[..., 0]
    raise LabelError(
        "it is a picture in colours, and colours are no numbers of classes; --palette FILE tells "
        "the colour of each class"
    )


def _classes_of_colours(values: np.ndarray, palette: Palette) -> np.ndarray:
    """`[h, w, 3]` uint8 to classes."""
    if values.ndim != 3 or values.shape[2] != 3:
        raise LabelError(f"an array of shape {list(values.shape)}; expected [height, width, 3]")
    codes, classes = palette.table
    wide = values.astype(np.int64)
    found = _code(wide[..., 0], wide[..., 1], wide[..., 2])  # type: ignore[arg-type]
    places = np.searchsorted(codes, found).clip(max=len(codes) - 1)  # type: ignore[arg-type]
    unknown = codes[places] != found
    if unknown.any():
        row, column = (int(axis[0]) for axis in np.nonzero(unknown))
        colour = " ".join(map(str, values[row, column].tolist()))
        count = int(unknown.sum())
        raise LabelError(
            f"the colour {colour} (row {row}, column {column}) is not in --palette "
            f"{palette.path!r}; {count:,} of its {unknown.size:,} pixels have colours that are not"
        )
    return classes[places]


def read_palette(path: str) -> Palette:
    """The colours in a file; see `LabelMapConfig.palette`.

    Raises:
        DataError: the file cannot be read, a line is no colour, or a colour is there twice.
    """
    option = f"--palette {path!r}"
    colours: list[tuple[int, int, int]] = []
    ignored: list[tuple[int, int, int]] = []
    names: list[str] = []
    for number, line in _lines(path, option):
        match = COLOUR.fullmatch(line)
        values = (0, 0, 0)
        if match and match[1]:
            values = tuple(bytes.fromhex(match[1]))  # type: ignore[assignment]
        elif match:
            values = tuple(int(match[place]) for place in (2, 3, 4))  # type: ignore[assignment]
        if not match or max(values) > 255:
            raise DataError(
                f"{option}: line {number} is {line!r}; expected red, green and blue from 0 to 255 "
                "or #rrggbb, then a name if there is one"
            )
        if values in (*colours, *ignored):
            raise DataError(f"{option}: line {number} has a colour that an earlier line has")
        name = (match[5] or "").strip()
        if name.lower() == IGNORE_NAME:
            ignored.append(values)
        else:
            colours.append(values)
            names.append(name)
    if any(names):
        problem = name_problem(names)
        if problem is not None:
            raise DataError(f"{option}: {problem}; expected a name for every colour, or for none")
    return Palette(path, tuple(colours), tuple(ignored), tuple(names) if any(names) else None)


def read_class_names(path: str) -> list[str]:
    """The names in the lines of a file, from class 0 on.

    Raises:
        DataError: the file cannot be read, or a name is empty or there twice.
    """
    option = f"--class_names {path!r}"
    names = [line for _, line in _lines(path, option)]
    problem = name_problem(names)
    if problem is not None:
        raise DataError(f"{option}: {problem}; expected a name of its own in each line")
    return names


def _lines(path: str, option: str) -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1 on."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{option} cannot be read: {error}; expected a text file") from error
    lines = [(n, line.strip()) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise DataError(f"{option} is empty; expected a line for each class")
    return lines
