"""Curves made fit to draw: a running mean, and fewer points with the same extremes."""

from __future__ import annotations

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
