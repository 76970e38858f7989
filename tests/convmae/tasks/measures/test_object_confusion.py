"""Detections matched with true objects: a confusion matrix, and the score that ranks pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from convmae.data.objects.annotations import ObjectPicture
from convmae.tasks.measures.object_confusion import agreement, object_confusion

LEFT, RIGHT, BELOW = (0, 0, 10, 10), (20, 0, 30, 10), (0, 20, 10, 30)


def truth(*objects: tuple[tuple[float, ...], int, bool]) -> ObjectPicture:
    boxes = np.array([box for box, _, _ in objects], dtype=np.float64).reshape(-1, 4)
    labels = np.array([label for _, label, _ in objects], dtype=np.int64)
    crowd = np.array([crowd for _, _, crowd in objects], dtype=bool)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return ObjectPicture("a.png", (40, 40), 1, boxes, labels, crowd, areas, [None] * len(objects))


def found(*detections: tuple[tuple[float, ...], int, float]) -> dict[str, torch.Tensor]:
    return {
        "boxes": torch.tensor([box for box, _, _ in detections]).reshape(-1, 4).float(),
        "labels": torch.tensor([label for _, label, _ in detections], dtype=torch.int64),
        "scores": torch.tensor([score for _, _, score in detections]),
    }


def test_right_wrong_missed_and_invented_objects() -> None:
    real = truth((LEFT, 0, False), (RIGHT, 1, False), (BELOW, 1, False))
    matrix = object_confusion(
        found((LEFT, 0, 0.9), (RIGHT, 0, 0.8), ((25, 25, 35, 35), 1, 0.7), (BELOW, 1, 0.4)),
        real,
        2,
        0.5,
    )
    # the detection of BELOW is too unlikely to count
    assert matrix.tolist() == [[1, 0, 0], [1, 0, 1], [0, 1, 0]]
    assert agreement(matrix) == pytest.approx(100 * 2 * 1 / (3 + 3))


def test_the_most_likely_detection_takes_the_object() -> None:
    near = (1, 0, 11, 10)
    matrix = object_confusion(found((near, 1, 0.6), (LEFT, 0, 0.9)), truth((LEFT, 0, False)), 2, 0)
    assert matrix.tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 0]]
    matrix = object_confusion(found((near, 1, 0.9), (LEFT, 0, 0.6)), truth((LEFT, 0, False)), 2, 0)
    assert matrix.tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 0]]


def test_a_detection_takes_the_object_that_it_overlaps_most() -> None:
    real = truth(((0, 0, 10, 10), 0, False), ((3, 0, 13, 10), 1, False))
    matrix = object_confusion(found(((3, 0, 13, 10), 1, 0.9)), real, 2, 0.5)
    assert matrix.tolist() == [[0, 0, 1], [0, 1, 0], [0, 0, 0]]


def test_groups_and_what_lies_in_them_count_for_nothing() -> None:
    real = truth(((0, 0, 30, 30), 0, True))
    inside, half_outside = (5.0, 5.0, 9.0, 9.0), (28.0, 0.0, 38.0, 10.0)
    matrix = object_confusion(found((inside, 0, 0.9), (half_outside, 0, 0.9)), real, 1, 0.5)
    assert matrix.tolist() == [[0, 0], [1, 0]]


@pytest.mark.parametrize("matrix", [[[0, 0], [0, 0]]])
def test_a_picture_without_objects_and_detections_has_no_score(matrix: list[list[int]]) -> None:
    empty = object_confusion(found(), truth(), 1, 0.5)
    assert empty.tolist() == matrix
    assert agreement(empty) is None
