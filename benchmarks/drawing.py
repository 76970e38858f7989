"""Charts as SVG text, coloured by the variables of the page that holds them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from benchmarks.report import number

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

COLOURS = 8  # --c0 ... of the page
WIDTH = 520
TOP, BOTTOM, LEFT, RIGHT = 12, 40, 62, 14
BAR, BAR_GAP, BAR_LEFT = 13, 9, 230


@dataclass(frozen=True)
class Series:
    """A line or a cloud of points.

    Attributes:
        name: for the key; empty for none.
        points: x and y, finite; positive where the axis is logarithmic.
        colour: which of the page's.
        dots: draw every point.
        line: connect them.
        dashed: with a dashed line.
        labels: of the points, shown where a pointer rests.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    dots: bool = True
    line: bool = True
    dashed: bool = False
    labels: Sequence[str] = ()


@dataclass(frozen=True)
class Axis:
    """What is along one side of a chart.

    Attributes:
        name: with the unit.
        log: logarithmic.
        ticks: where to write numbers; chosen if None.
        text: how numbers are written.
        start: a value that is shown whatever the points are; None for none.
    """

    name: str
    log: bool = False
    ticks: Sequence[float] | None = None
    text: Callable[[float], str] = "{:g}".format
    start: float | None = None


class _Scale:
    """From values to pixels."""

    def __init__(self, axis: Axis, values: Sequence[float], first: float, last: float) -> None:
        known = [*values, *(() if axis.start is None else (axis.start,)), *(axis.ticks or ())]
        self.axis, self._first, self._last = axis, first, last
        low, high = min(known), max(known)
        if axis.log:
            self.ticks = list(axis.ticks or _decades(low, high))
            low, high = min(low, *self.ticks), max(high, *self.ticks)
            low, high = (low / 1.1, high * 1.1) if low == high else (low, high)
        else:
            self.ticks = list(axis.ticks or _steps(low, high))
            low, high = min(low, *self.ticks), max(high, *self.ticks)
            low, high = (low - 1, high + 1) if low == high else (low, high)
        self._low, self._high = self._flat(low), self._flat(high)

    def _flat(self, value: float) -> float:
        return math.log(value) if self.axis.log else value

    def __call__(self, value: float) -> float:
        share = (self._flat(value) - self._low) / (self._high - self._low)
        return self._first + share * (self._last - self._first)


def _decades(low: float, high: float) -> list[float]:
    """1, 2, 5 of every decade around the values; fewer where the decades are many."""
    begin, end = math.floor(math.log10(low)), math.ceil(math.log10(high))
    digits = (1, 2, 5) if end - begin <= 2 else (1, 3) if end - begin <= 4 else (1,)
    every = [digit * 10.0**power for power in range(begin, end + 1) for digit in digits]
    first = max([tick for tick in every if tick <= low * 1.001], default=every[0])
    last = min([tick for tick in every if tick >= high * 0.999], default=every[-1])
    return [tick for tick in every if first <= tick <= last]


def _steps(low: float, high: float) -> list[float]:
    """About five round numbers around the values."""
    width = (high - low) or abs(high) or 1.0
    rough = width / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * digit for digit in (1, 2, 2.5, 5, 10) if power * digit >= rough * 0.999)
    begin, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(begin, end + 1)]


def chart(title: str, x: Axis, y: Axis, series: Sequence[Series], *, height: int = 250) -> str:
    """A figure with axes, a key and all series; of none, nothing."""
    series = [one for one in series if one.points]
    if not series:
        return ""
    xs, ys = ([point[i] for one in series for point in one.points] for i in (0, 1))
    across = _Scale(x, xs, LEFT, WIDTH - RIGHT)
    up = _Scale(y, ys, height - BOTTOM, TOP)
    parts = [*_grid(across, up, height)]
    for one in series:
        parts += _drawn(one, across, up)
    keys = [(one.name, one.colour, one.dashed) for one in series if one.name]
    return _figure(title, f"{title}: {y.name} over {x.name}", height, parts, keys)


def _grid(across: _Scale, up: _Scale, height: int) -> list[str]:
    right, bottom = WIDTH - RIGHT, height - BOTTOM
    parts = []
    for tick in up.ticks:
        at = up(tick)
        parts.append(_line("gridline", LEFT, at, right, at))
        parts.append(_text(LEFT - 6, at + 4, up.axis.text(tick), "end"))
    for tick in across.ticks:
        at = across(tick)
        parts.append(_line("gridline", at, TOP, at, bottom))
        parts.append(_text(at, bottom + 15, across.axis.text(tick), "middle"))
    parts.append(_line("axis", LEFT, bottom, right, bottom))
    parts.append(_text((LEFT + right) / 2, height - 5, across.axis.name, "middle"))
    middle = (TOP + bottom) / 2
    turned = f' transform="rotate(-90 12 {middle:.0f})"'
    parts.append(_text(12, middle, up.axis.name, "middle", turned))
    return parts


def _drawn(one: Series, across: _Scale, up: _Scale) -> list[str]:
    style = f'style="--c:var(--c{one.colour % COLOURS})"'
    places = [(across(px), up(py)) for px, py in one.points]
    parts = []
    if one.line and len(places) > 1:
        path = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in places)
        dashes = ' stroke-dasharray="5 4"' if one.dashed else ""
        parts.append(f'<path class="curve" {style} d="{path}"{dashes}/>')
    if one.dots:
        for i, (px, py) in enumerate(places):
            label = one.labels[i] if i < len(one.labels) else one.name
            parts.append(
                f'<circle class="dot" {style} cx="{px:.1f}" cy="{py:.1f}" r="3.5">'
                f"<title>{escape(label)}</title></circle>"
            )
    return parts


def bars(title: str, unit: str, groups: Sequence[tuple[str, Sequence[tuple[str, float]]]]) -> str:
    """Lying bars: for each group its name, and name and value of each bar in it; of none, nothing.

    Bars of the same name have the same colour.
    """
    if not groups:
        return ""
    names = list(dict.fromkeys(name for _, inside in groups for name, _ in inside))
    most = max(value for _, inside in groups for _, value in inside) or 1.0
    parts, at = [], 6.0
    for group, inside in groups:
        middle = at + len(inside) * BAR / 2 + 4
        parts.append(_text(BAR_LEFT - 8, middle, group, "end"))
        for name, value in inside:
            width = value / most * (WIDTH - BAR_LEFT - 80)
            style = f'style="--c:var(--c{names.index(name) % COLOURS})"'
            parts.append(
                f'<rect class="bar-of" {style} x="{BAR_LEFT}" y="{at:.1f}" width="{width:.1f}" '
                f'height="{BAR - 2}"><title>{escape(f"{group}, {name}")}</title></rect>'
            )
            label = f"{number(value)} {unit}"
            parts.append(_text(BAR_LEFT + width + 6, at + BAR - 3.5, label, "start"))
            at += BAR
        at += BAR_GAP
    keys = [(name, i, False) for i, name in enumerate(names)]
    return _figure(title, title, math.ceil(at), parts, keys)


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    places = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line class="{kind}" {places}/>'


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f"<text {place}{more}>{escape(text)}</text>"


def _figure(
    title: str,
    label: str,
    height: int,
    parts: Sequence[str],
    keys: Sequence[tuple[str, int, bool]],
) -> str:
    key = "".join(
        f'<span class="key{" dashed" if dashed else ""}" '
        f'style="--c:var(--c{colour % COLOURS})">{escape(name)}</span>'
        for name, colour, dashed in keys
    )
    return (
        f'<figure class="panel chart"><header><h3>{escape(title)}</h3>{key}</header>'
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg></figure>"
    )
