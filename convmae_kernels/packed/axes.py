"""Axes of a map: one letter for each of its dimensions, `"BCHW"` and what networks make of it.

`B` is the images, `H` and `W` rows and columns of positions, `N` both in one (`H * W`), and every
`C` one dimension of channels, of which there may be none or several: `[B, g, C // g, H, W]` is
`"BCCHW"`, the mean over its channels `"BHW"`, tokens are `"BNC"`. Dimensions of channels are those
of packed features `[T, s*s, *channels]`, in the same order.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

NCHW, NHWC = "BCHW", "BHWC"
POSITIONS = "HWN"
NAMES = {"B": "images", "H": "rows", "W": "columns", "N": "positions", "C": "channels"}
REGROUPED = {  # what becomes of dimensions when they are viewed as so many others
    ("B", 1): "B",
    ("H", 1): "H",
    ("W", 1): "W",
    ("N", 1): "N",
    ("HW", 1): "N",
    ("N", 2): "HW",
    ("H", 2): "HC",
    ("W", 2): "WC",
    ("HC", 1): "H",
    ("WC", 1): "W",
}


def place(axes: str, dim: int) -> int:
    """The number of a dimension, which may be negative, from 0.

    Raises:
        ValueError: there is no such dimension.
    """
    if not -len(axes) <= dim < len(axes):
        raise ValueError(f"dim={dim} of a map of {len(axes)} dimensions")
    return dim % len(axes)


def places(axes: str, dims: int | Sequence[int] | None) -> list[int]:
    """The numbers of dimensions; of all for None and for ()."""
    if dims is None:
        return list(range(len(axes)))
    chosen = [dims] if isinstance(dims, int) else list(dims)
    return [place(axes, dim) for dim in chosen] or list(range(len(axes)))


def channel(axes: str, dim: int) -> int:
    """Which of the dimensions of channels a dimension is.

    Raises:
        NotImplementedError: it is no dimension of channels.
    """
    at = place(axes, dim)
    if axes[at] != "C":
        raise NotImplementedError(
            f"only along channels, got dim={dim}, the {NAMES[axes[at]]} of {axes}"
        )
    return axes[:at].count("C")


def without(axes: str, dims: Sequence[int]) -> str:
    """The axes that are left when some dimensions are gone."""
    return "".join(letter for at, letter in enumerate(axes) if at not in dims)


def order_of(letters: str, axes: str) -> list[int]:
    """The permutation from dimensions `letters` to those of `axes`; channels keep their order."""
    channels = iter([at for at, letter in enumerate(letters) if letter == "C"])
    return [next(channels) if letter == "C" else letters.index(letter) for letter in axes]


# -- views ----------------------------------------------------------------------------------------


class Group(NamedTuple):
    """Neighbouring dimensions that a view makes others of."""

    old: str
    new: str
    sizes: tuple[int, ...]  # of the new dimensions


def view_sizes(shape: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """The sizes of a view, -1 replaced by what is left.

    Raises:
        ValueError: the number of values differs.
    """
    total, known = 1, 1
    for size in shape:
        total *= size
    for size in sizes:
        known *= 1 if size == -1 else size
    free = [size for size in sizes if size == -1]
    if len(free) > 1 or (free and (known == 0 or total % known)) or (not free and known != total):
        raise ValueError(f"{tuple(shape)} cannot be viewed as {tuple(sizes)}")
    return [total // known if size == -1 else size for size in sizes]


def view_groups(
    axes: str, shape: Sequence[int], sizes: Sequence[int], height: int, width: int
) -> list[Group]:
    """What becomes of the dimensions of a map in `view(*sizes)`, group by group.

    Args:
        axes: of the map.
        shape: of the map.
        sizes: of the view, as many values.
        height, width: rows and columns of the map.

    Raises:
        NotImplementedError: channels, positions and images would be mixed.
    """
    groups: list[tuple[int, int, int, int]] = []
    i = j = 0
    while i < len(shape) and j < len(sizes):
        first, second = i, j
        a, b, i, j = shape[i], sizes[j], i + 1, j + 1
        while a != b:
            if a < b:
                a, i = a * shape[i], i + 1
            else:
                b, j = b * sizes[j], j + 1
        groups.append((first, i, second, j))
    if groups and (i, j) != (len(shape), len(sizes)):  # what is left has size 1
        first, _, second, _ = groups.pop()
        groups.append((first, len(shape), second, len(sizes)))
    found = []
    for first, last, second, end in groups:
        old, new = tuple(shape[first:last]), tuple(sizes[second:end])
        letters = _regrouped(axes[first:last], old, new, (height, width))
        if letters is None:
            raise NotImplementedError(
                f"a view of {tuple(shape)} ({axes}) as {tuple(sizes)} mixes channels, positions "
                "or images"
            )
        found.append(Group(axes[first:last], letters, new))
    return found


def _regrouped(
    letters: str, old: tuple[int, ...], new: tuple[int, ...], positions: tuple[int, int]
) -> str | None:
    """The letters of the new dimensions of a group; None if there are none for them."""
    if old == new:
        return letters
    if set(letters) == {"C"}:
        return "C" * len(new)
    kept = "".join(x for x, size in zip(letters, old) if x != "C" or size != 1)
    wide = [at for at, size in enumerate(new) if size != 1] or [len(new) - 1]
    named = REGROUPED.get((kept, len(wide)))
    if named is None or (named == "HW" and tuple(new[at] for at in wide) != positions):
        return None
    result = ["C"] * len(new)
    for at, letter in zip(wide, named):
        result[at] = letter
    return "".join(result)


# -- indices --------------------------------------------------------------------------------------


class Index(NamedTuple):
    """What `x[...]` asks for.

    Attributes:
        channels: the index of each dimension of channels, None for a new one of size 1.
        step: of rows and columns.
        start: of rows and columns, below `step`.
        axes: of the result.
    """

    channels: tuple[Any, ...]
    step: int
    start: tuple[int, int]
    axes: str


def read_index(axes: str, shape: Sequence[int], index: Any) -> Index:
    """Reads an index of a map, whose entries are of channels, or the same step of rows and columns.

    Raises:
        NotImplementedError: it chooses images, or some positions only.
        ValueError: it has more entries than the map has dimensions.
    """
    entries = list(index) if isinstance(index, tuple) else [index]
    number = sum(entry is not None and entry is not Ellipsis for entry in entries)
    if number > len(axes) or sum(entry is Ellipsis for entry in entries) > 1:
        raise ValueError(f"an index of {number} entries into {len(axes)} dimensions")
    if not any(entry is Ellipsis for entry in entries):
        entries.append(Ellipsis)
    middle = [entry is Ellipsis for entry in entries].index(True)
    entries[middle : middle + 1] = [slice(None)] * (len(axes) - number)
    channels: list[Any] = []
    steps: dict[str, tuple[int, int]] = {}
    letters, at, lists = "", 0, 0
    for entry in entries:
        if entry is None:
            channels.append(None)
            letters += "C"
            continue
        letter, size, at = axes[at], shape[at], at + 1
        if letter == "C":
            channels.append(entry)
            lists += not isinstance(entry, (int, slice))
            letters += "" if isinstance(entry, int) else "C"
            continue
        letters += letter
        steps[letter] = _step(entry, size, letter)
    if lists > 1 or (lists and any(isinstance(entry, int) for entry in channels)):
        raise NotImplementedError("only one list or tensor of channels in an index")
    (step, first), (other, second) = steps.get("H", (1, 0)), steps.get("W", (1, 0))
    if step != other or step & (step - 1) or steps.get("N", (1, 0)) != (1, 0):
        raise NotImplementedError(
            "only the same step of rows and columns, a power of two, keeps the grid of blocks"
        )
    return Index(tuple(channels), step, (first, second), letters)


def _step(entry: Any, size: int, letter: str) -> tuple[int, int]:
    """Step and start of a slice that goes on to the end."""
    if not isinstance(entry, slice):
        raise NotImplementedError(f"it chooses among {NAMES[letter]}, which a mask cannot express")
    step = 1 if entry.step is None else operator.index(entry.step)
    if step == 0:
        raise ValueError("slice step cannot be zero")
    start = 0 if entry.start is None else _within(entry.start, size)
    stop = size if entry.stop is None else _within(entry.stop, size)
    if step < 1 or start >= step or stop != size or (letter == "B" and step != 1):
        raise NotImplementedError(f"it chooses among {NAMES[letter]}, which a mask cannot express")
    return step, start


def _within(end: Any, size: int) -> int:
    """An end of a slice, from the beginning of an axis and inside of it.

    `slice.indices` does the same, but torch 2.11 cannot compile it.

    Raises:
        TypeError: it is no integer.
    """
    index = operator.index(end)
    return max(0, min(size, index + size if index < 0 else index))
