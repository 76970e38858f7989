"""IoU, nIoU, Pd and Fa of small targets, against recorded numbers and on made pictures."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from golden.dense import fill_dense
from torch import Tensor

from tests.support.paths import GOLDEN

pytest.importorskip("torchmetrics")
pytest.importorskip("skimage")

from convmae.tasks.measures.small_targets import SmallTargets

RECORDED = json.loads((GOLDEN / "dense" / "small_target_metrics.json").read_text())


def measured(prediction: Tensor, target: Tensor) -> dict[str, Any]:
    measures = SmallTargets()
    measures.update(prediction, target)
    return measures.compute()


def picture(*squares: tuple[int, int, int], size: int = 32) -> Tensor:
    """`[1, size, size]` with squares of 1 at `(row, column)`, of `side` pixels."""
    made = torch.zeros(1, size, size, dtype=torch.int64)
    for row, column, side in squares:
        made[0, row : row + side, column : column + side] = 1
    return made


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda recorded: f"seed {recorded['seed']}")
def test_the_numbers_of_basic_irstd(recorded: dict[str, Any]) -> None:
    """In batches of 5, and merged from two halves."""
    target, prediction = map(torch.from_numpy, fill_dense.small_targets(recorded["seed"]))
    whole, first, second = SmallTargets(), SmallTargets(), SmallTargets()
    for start in range(0, len(target), 5):
        whole.update(prediction[start : start + 5], target[start : start + 5])
    first.update(prediction[:10], target[:10])
    second.update(prediction[10:], target[10:])
    first.merge_state(second)
    for measures in (whole, first):
        figures = measures.compute()
        assert figures["targets"] == recorded["targets"]
        assert figures["pictures"] == len(target)
        for name in ("iou", "niou", "pd", "fa"):
            assert figures[name] == pytest.approx(recorded[name], rel=1e-6), name


def test_targets_are_found_by_near_centroids_one_to_one() -> None:
    three_away = measured(picture((10, 13, 1)), picture((10, 10, 1)))
    assert (three_away["pd"], three_away["fa"]) == (0, 1 / 32**2)  # 3 pixels are not closer than 3
    near = measured(picture((12, 12, 1)), picture((10, 10, 1)))
    assert (near["pd"], near["fa"], near["iou"]) == (1, 0, 0)  # without an overlap
    one_for_two = measured(picture((10, 11, 1)), picture((10, 10, 1), (10, 12, 1)))
    assert (one_for_two["pd"], one_for_two["fa"]) == (0.5, 0)
    # The first in raster order is taken, though the second lies nearer; the second finds nothing.
    two_for_one = measured(picture((8, 10, 1), (10, 10, 2)), picture((10, 10, 2)))
    assert (two_for_one["pd"], two_for_one["fa"]) == (1, 4 / 32**2)
    corners = measured(picture((10, 10, 1), (11, 11, 1)), picture((10, 10, 1), (11, 11, 1)))
    assert corners["targets"] == 1


def test_ignored_pixels_count_for_nothing() -> None:
    target = picture((4, 4, 3), (20, 20, 3))
    target[:, 16:] = 255
    figures = measured(picture((4, 4, 3), (25, 25, 2)), target)
    assert (figures["iou"], figures["pd"], figures["fa"]) == (1, 1, 0)
    missed = measured(picture((8, 8, 2)), target)
    assert missed["fa"] == 4 / (16 * 32)
    nothing = measured(picture(), torch.full((1, 32, 32), 255))
    assert nothing["pictures"] == 0 and math.isnan(nothing["niou"])


def test_without_targets() -> None:
    figures = measured(picture(), picture())
    assert math.isnan(figures["pd"]) and math.isnan(figures["iou"])
    assert (figures["niou"], figures["fa"]) == (0, 0)  # 0, as in ACM's code


def test_classes_are_not_told_apart() -> None:
    assert measured(2 * picture((4, 4, 2)), picture((4, 4, 2)))["iou"] == 1


def test_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"prediction \[1, 32, 32\] and target \[1, 8, 8\]"):
        measured(picture(), picture(size=8))
