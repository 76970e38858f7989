"""Numbers as a reader wants them."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

MINUTE, HOUR, DAY = 60, 3600, 86400  # seconds


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether `value` is a finite number; a truth value is none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond floating point
        return False


def number(value: float) -> str:
    """About four digits: 0.7618, 166.3, 12,340, 3.2e-05."""
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e7):
        return f"{value:.3g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def mebibytes(value: float) -> str:
    """512 MiB, 12.3 GiB."""
    return f"{value / 1024:.3g} GiB" if value >= 1024 else f"{value:.0f} MiB"


def clock(seconds: float) -> str:
    """85 ms, 7.5 s, 12 min 4 s, 3 h 20 min, 2 d 4 h."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < MINUTE:
        return f"{seconds:.3g} s"
    whole = int(seconds)
    if whole < HOUR:
        return f"{whole // MINUTE} min {whole % MINUTE} s"
    if whole < DAY:
        return f"{whole // HOUR} h {whole % HOUR // MINUTE} min"
    return f"{whole // DAY} d {whole % DAY // HOUR} h"


def plain(value: Any) -> str:
    """A value of an option or an event, as one would type it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return " x ".join(map(plain, value)) if isinstance(value, list | tuple) else str(value)
