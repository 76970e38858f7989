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
    padding: str | int | tuple,
    kernel: tuple[int, int],
    stride: int,
    dilation: tuple[int, int],
) -> tuple[int, int]:
    """The padding above and left of the map.

    Args:
        padding: "same", "valid", a number, a pair for rows and columns, or a pair of pairs
            `((top, bottom), (left, right))`, whose numbers may be negative: positions left out.
        kernel, stride, dilation: of the convolution or pooling.

    Raises:
        ValueError: with this padding the map would not shrink by `stride` exactly.
    """
    spans = [d * (k - 1) for d, k in zip(dilation, kernel)]
    sides = _four_sides(padding, spans, stride)
    if not all(span - stride < sum(side) <= span for span, side in zip(spans, sides)):
        raise ValueError(
            f"padding must keep the grid of blocks: with kernel {kernel}, stride {stride} and "
            f"dilation {dilation} that is {_fitting(sides, spans, stride)}, got {padding!r}"
        )
    return sides[0][0], sides[1][0]


def _four_sides(
    padding: str | int | tuple, spans: Sequence[int], stride: int
) -> list[tuple[int, int]]:
    """`[(top, bottom), (left, right)]`."""
    if padding in ("same", "valid"):
        # a kernel within its stride, as a patch embedding has it, looks at its own positions
        half = [span // 2 if span >= stride and padding == "same" else 0 for span in spans]
        return [(p, p) for p in half]
    if isinstance(padding, str):
        raise ValueError(f'padding must be "same", "valid" or numbers, got {padding!r}')
    if _is_four_sided(padding):
        rows, columns = padding  # type: ignore[misc]
        return [(rows[0], rows[1]), (columns[0], columns[1])]
    return [(p, p) for p in pair("padding", padding, least=0)]


def _is_four_sided(padding: object) -> bool:
    """Whether it is `((top, bottom), (left, right))`."""
    return isinstance(padding, tuple) and [
        [type(p) for p in side] for side in padding if isinstance(side, tuple)
    ] == [[int, int], [int, int]]


def _fitting(sides: Sequence[tuple[int, int]], spans: Sequence[int], stride: int) -> str:
    """Which padding would fit, in words."""
    if any(before != after for before, after in sides):
        above, beside = (f"{max(span - stride + 1, 0)} to {span}" for span in spans)
        return f"{above} above and below together, and {beside} left and right"
    rows, columns = (
        [p for p in range(span // 2 + 1) if span < 2 * p + stride <= span + stride]
        for span in spans
    )
    if not (rows and columns):
        return "impossible"
    if rows == columns:
        return f"one of {rows}"
    return f"one of {rows} in rows and one of {columns} in columns"
