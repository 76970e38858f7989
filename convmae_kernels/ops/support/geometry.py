"""Where windows lie: the argument checks and the arithmetic of kernels, strides and halos.

The ops take it from here. `reference`, which judges them, does not: it finds the positions that an
output looks at in its own way, so that a mistake here shows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def window_halo(
    kernel: Sequence[int], stride: int, padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int, int, int]:
    """The halo `(top, bottom, left, right)` of the windows that a convolution of blocks looks at.

    In positions; negative where the windows leave out some of the block.
    """
    top, left = padding
    bottom, right = (d * (k - 1) - p - stride + 1 for k, p, d in zip(kernel, padding, dilation))
    return top, bottom, left, right


def reach(halo: Sequence[int], side: int) -> int:
    """The radius of the neighbour table, in blocks of this side, that a halo needs."""
    return max(0, -(-max(halo) // side))


# -- arguments ------------------------------------------------------------------------------------


def pair(name: str, value: int | tuple[int, int], least: int = 1) -> tuple[int, int]:
    """A value for rows and one for columns, each at least `least`.

    Raises:
        ValueError: it is not such a number or pair of numbers.
    """
    try:
        both = (value, value) if isinstance(value, int) else tuple(value)
    except TypeError:
        both = ()
    if len(both) != 2 or not all(isinstance(v, int) and v >= least for v in both):
        kind = "positive" if least == 1 else "non-negative"
        raise ValueError(f"{name} must be a {kind} integer or a pair of them, got {value!r}")
    return both[0], both[1]


def check_stride(stride: int | tuple[int, int], side: int) -> int:
    """The stride of both directions.

    Raises:
        ValueError: blocks of this side cannot be sampled with this stride.
    """
    rows, columns = pair("stride", stride)
    if rows != columns or side % rows or rows & (rows - 1):
        raise ValueError(
            f"stride must be a power of two, the same in both directions, that divides the side of "
            f"the blocks, {side} here, got {stride}; blocks of a larger part of the image have a "
            "larger side"
        )
    return rows


def check_padding(
    padding: str | int | tuple[int, int],
    kernel: tuple[int, int],
    stride: int,
    dilation: tuple[int, int],
) -> tuple[int, int]:
    """The padding of both directions.

    Raises:
        ValueError: with this padding the map would not shrink by `stride` exactly.
    """
    spans = [d * (k - 1) for d, k in zip(dilation, kernel)]

    good = [
        [p for p in range(span // 2 + 1) if span < 2 * p + stride <= span + stride]
        for span in spans
    ]
    if padding in ("same", "valid"):
        # a kernel within its stride, as a patch embedding has it, looks at its own positions
        half = [span // 2 if span >= stride else 0 for span in spans]
        wanted = tuple(half) if padding == "same" else (0, 0)
    elif isinstance(padding, str):
        raise ValueError(f'padding must be "same", "valid" or numbers, got {padding!r}')
    else:
        wanted = pair("padding", padding, least=0)
    if not all(p in fitting for p, fitting in zip(wanted, good)):
        rows, columns = good
        expected = f"one of {rows} in rows and one of {columns} in columns"
        if not (rows and columns):
            expected = "impossible"
        elif rows == columns:
            expected = f"one of {rows}"
        raise ValueError(
            f"padding must keep the grid of blocks: with kernel {kernel}, stride {stride} and "
            f"dilation {dilation} that is {expected}, got {padding!r}"
        )
    return wanted[0], wanted[1]
