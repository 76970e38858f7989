"""Whether the time of an op is a straight line of the share that is visible."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.report import number

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from benchmarks.runner import Row

STRAIGHT = 0.1  # largest deviation of a straight line, as a share of what was measured


@dataclass(frozen=True)
class Line:
    """`a + b * share`, fitted to measures by least squares.

    Attributes:
        a: at a share of 0: what does not depend on the share, in the measures' unit.
        b: from a share of 0 to 1.
        r2: `1 - residual / total sum of squares`; 1 where the measures are all alike.
        points: share and measure, by share.
    """

    a: float
    b: float
    r2: float
    points: tuple[tuple[float, float], ...]

    def at(self, share: float) -> float:
        """The line's value."""
        return self.a + self.b * share

    def deviation(self, share: float, measure: float) -> float:
        """`(measure - line) / measure`."""
        return (measure - self.at(share)) / measure

    @property
    def largest(self) -> tuple[float, float]:
        """The share of the largest deviation, and that deviation."""
        share, measure = max(self.points, key=lambda point: abs(self.deviation(*point)))
        return share, self.deviation(share, measure)

    @property
    def bends(self) -> list[float]:
        """The shares that are further than `STRAIGHT` from the line; none if it is straight."""
        return [point[0] for point in self.points if abs(self.deviation(*point)) > STRAIGHT]

    @property
    def verdict(self) -> str:
        """ "a straight line", or where it is none."""
        if not self.bends:
            return "a straight line"
        return f"not a straight line at {', '.join(f'{share:.0%}' for share in self.bends)} visible"


def fit(points: Sequence[tuple[float, float]]) -> Line:
    """The line through `(share, measure)` by least squares.

    Raises:
        ValueError: there are fewer than three different shares: two points are always on a line.
    """
    if len({share for share, _ in points}) < 3:
        raise ValueError(f"a fit needs at least three different shares, got {list(points)}")
    shares, measures = zip(*sorted(points), strict=True)
    slope, intercept = statistics.linear_regression(shares, measures)
    mean = statistics.fmean(measures)
    total = sum((measure - mean) ** 2 for measure in measures)
    residual = sum((m - intercept - slope * s) ** 2 for s, m in zip(shares, measures))
    r2 = 1 - residual / total if total else 1.0
    return Line(intercept, slope, r2, tuple(zip(shares, measures, strict=True)))


def series(rows: Iterable[Row], axis: str, contender: str = "packed") -> dict[str, list[Row]]:
    """The points of every sweep along an axis, its centre among them, by op; ascending."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.contender == contender and row.at.get("axis") in (axis, "centre"):
            found.setdefault(row.at["op"], []).append(row)
    return {
        op: sorted(points, key=lambda row: row.at[axis])
        for op, points in found.items()
        if len(points) > 1 and all(axis in row.at for row in points)
    }


def lines(rows: Sequence[Row], contender: str = "packed") -> dict[str, Line]:
    """The line of every op that was swept along the visible share."""
    made = {}
    for op, points in series(rows, "visible", contender).items():
        if len({row.at["visible"] for row in points}) > 2:
            made[op] = fit([(row.at["visible"], row.median) for row in points])
    return made


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A head and a line of text for every fit: op, verdict, a, b, R^2, largest deviation."""
    cells = [["op", "", "a (0 % visible)", "b (per 100 %)", "R²", "largest deviation"]]
    units = {row.at["op"]: row.unit for row in rows if row.at}
    for op, line in lines(rows).items():
        share, deviation = line.largest
        cells.append(
            [
                op,
                line.verdict,
                f"{number(line.a)} {units[op]}",
                f"{number(line.b)} {units[op]}",
                f"{line.r2:.4f}",
                f"{deviation:+.0%} at {share:.0%} visible",
            ]
        )
    return cells
