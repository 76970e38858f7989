"""Curves made fit to draw: a running mean, and fewer points with the same extremes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


def smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over about a twentieth of the points, shorter at both ends; same length."""
    reach = max(1, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    middle = np.arange(len(values))
    low, high = np.maximum(middle - reach, 0), np.minimum(middle + reach + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def thin(values: np.ndarray, limit: int) -> np.ndarray:
    """Indices of at most `limit` points of a curve: the lowest and the highest of each stretch.

    Args:
        values: float `[n]`, finite. The first and the last point always stay.
        limit: at least 4.

    Returns:
        int64, ascending; all `n` of them where they are few enough.
    """
    count = len(values)
    if count <= limit:
        return np.arange(count)
    edges = np.linspace(1, count - 1, (limit - 2) // 2 + 1).astype(int)
    kept = {0, count - 1}
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        kept.add(low + int(values[low:high].argmin()))
        kept.add(low + int(values[low:high].argmax()))
    return np.array(sorted(kept))


class Curve:
    """A curve of any length in bounded memory: its first and last point, and extremes between.

    Points are gathered in stretches of equal number; where there are more than `STRETCHES`, two
    become one. A stretch keeps its mean, its lowest and its highest point. Until the first joining
    the curve is exact.
    """

    STRETCHES = 2048

    def __init__(self) -> None:
        self.count = 0
        self._length = 1  # points in a stretch
        self._stretches: list[_Stretch] = []
        self._first = self._last = (0.0, 0.0)

    def add(self, x: float, y: float) -> None:
        """Appends a point, of finite numbers."""
        point = _Stretch(1, y, (x, y), (x, y), x)
        if self._stretches and self._stretches[-1].number < self._length:
            self._stretches[-1] = self._stretches[-1].joined(point)
        else:
            self._stretches.append(point)
        self._first = self._first if self.count else (x, y)
        self._last = (x, y)
        self.count += 1
        if len(self._stretches) > self.STRETCHES:
            pairs = zip(self._stretches[::2], self._stretches[1::2], strict=False)
            odd = self._stretches[-1:] if len(self._stretches) % 2 else []
            self._stretches = [one.joined(other) for one, other in pairs] + odd
            self._length *= 2

    def points(self, limit: int) -> list[tuple[float, float]]:
        """At most `limit` points, in order: the first, the last and the extremes."""
        found = [self._first] if self.count else []
        for stretch in self._stretches:
            for point in sorted({stretch.low, stretch.high}):
                if point != found[-1]:
                    found.append(point)
        if self.count and found[-1] != self._last:
            found.append(self._last)
        return [found[index] for index in thin(np.array([y for _, y in found]), limit)]

    def smoothed(self, limit: int) -> list[tuple[float, float]]:
        """The running mean over about a twentieth of the curve, at most `limit` points."""
        means = smooth(np.array([stretch.total / stretch.number for stretch in self._stretches]))
        kept = thin(means, limit)
        return [(self._stretches[index].last, float(means[index])) for index in kept]


class _Stretch(NamedTuple):
    number: int  # of points
    total: float
    low: tuple[float, float]  # x and y, as of `high`
    high: tuple[float, float]
    last: float  # x

    def joined(self, after: _Stretch) -> _Stretch:
        return _Stretch(
            self.number + after.number,
            self.total + after.total,
            min(self.low, after.low, key=lambda point: point[1]),
            max(self.high, after.high, key=lambda point: point[1]),
            after.last,
        )


class EvenSample:
    """Every n-th of a series of values; n doubles where more than `LIMIT` would be kept."""

    LIMIT = 4096

    def __init__(self) -> None:
        self.values: list[float] = []
        self._every, self._count = 1, 0

    def add(self, value: float) -> None:
        """Takes note of the next value."""
        if self._count % self._every == 0:
            self.values.append(value)
        self._count += 1
        if len(self.values) > self.LIMIT:
            self.values = self.values[::2]
            self._every *= 2

    def middle(self) -> float | None:
        """The median; of three values or more the first, with its warm-up, is left out."""
        values = self.values[1:] if len(self.values) > 2 else self.values
        return float(np.median(values)) if values else None
