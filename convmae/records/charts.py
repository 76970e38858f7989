"""The charts of a run's page, as the numbers that its script draws."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convmae.records.scores import DRAWN_LABELS, SCORES

if TYPE_CHECKING:
    from convmae.records.curves import Curve
    from convmae.records.history import History

MAX_POINTS = 2000  # of a curve: two for each pixel of a wide screen's chart
MANY = 20  # points of a loss, from which a smoothed curve helps


def charts(history: History) -> list[dict[str, Any]]:
    """The charts of the page: title, unit, and series of `name`, `x` (steps) and `y`."""
    trained, scored = history.curves, history.scores
    rates = {"images_per_s": "whole", "model_images_per_s": "model", "input_images_per_s": "input"}
    made = [_loss_chart(trained["loss"])]
    for title, unit, names, curves in (
        *((*group, scored) for group in _score_charts()),
        ("Loss of evaluations", "", {"loss": "loss"}, scored),
        ("Learning rate", "", {"lr": "learning rate"}, trained),
        ("Gradient norm", "", {"grad_norm": "gradient norm"}, trained),
        ("Throughput", "images/s", rates, trained),
        ("Memory", "MiB", {"memory_mib": "peak"}, trained),
    ):
        lines = [series(label, curves[name].points(MAX_POINTS)) for name, label in names.items()]
        made.append({"title": title, "unit": unit, "series": [line for line in lines if line]})
    return [chart for chart in made if chart["series"]]


def _score_charts() -> list[tuple[str, str, dict[str, str]]]:
    """Of each chart of scores title, unit, and the labels of its curves by their names."""
    charts: dict[str, tuple[str, str, dict[str, str]]] = {}
    for name, score in SCORES.items():
        chart = charts.setdefault(score.chart, (score.chart, score.unit, {}))
        chart[2][name] = DRAWN_LABELS.get(name, score.label)
    return list(charts.values())


def epochs(history: History) -> dict[str, Any]:
    """The epoch of steps, for the page to interpolate."""
    return series("epoch", history.epochs.points(MAX_POINTS))


def series(label: str, points: list[tuple[float, float]]) -> dict[str, Any]:
    """A curve, its values with six digits; empty if it has no points."""
    if not points:
        return {}
    x, y = zip(*points, strict=True)
    return {"name": label, "x": list(x), "y": [float(f"{value:.6g}") for value in y]}


def _loss_chart(loss: Curve) -> dict[str, Any]:
    raw = series("as logged", loss.points(MAX_POINTS))
    many = loss.count > MANY
    lines = [raw | {"faint": True} if many else raw] if raw else []
    if many:
        lines.append(series("smoothed", loss.smoothed(MAX_POINTS)))
    return {"title": "Loss", "unit": "", "wide": True, "series": lines}
