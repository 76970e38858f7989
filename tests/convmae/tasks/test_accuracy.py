"""Accuracy: what is told depends on how many classes there are."""

from __future__ import annotations

import pytest
import torch

from convmae.data.loader import Batch
from convmae.data.normalisation import Statistics
from convmae.tasks.accuracy import accuracy
from convmae.training.distributed import World
from convmae.training.run import accuracy_text

pytest.importorskip("torchmetrics")


@pytest.mark.parametrize(
    ("classes", "text"),
    [
        (3, "accuracy 50.00 %"),
        (5, "accuracy 50.00 %"),
        (6, "accuracy 50.00 % (best of 5: 75.00 %)"),
    ],
)
def test_best_of_5_is_told_of_more_than_5_classes_only(classes: int, text: str) -> None:
    """Four pictures, class 0 the most likely of each and the last class the least."""
    scores = torch.nn.Linear(1, classes)
    with torch.no_grad():
        scores.weight.zero_()
        scores.bias.copy_(-torch.arange(float(classes)))
    model = torch.nn.Sequential(torch.nn.Flatten(), scores)
    labels = torch.tensor([0, 0, 1, classes - 1])
    images = torch.zeros(4, 1, 1, 1, dtype=torch.uint8)
    batch = Batch(images, labels, torch.zeros(4, 2, dtype=torch.int64), [], 0.0)
    world = World(0, 1, torch.device("cpu"), "single")
    autocast = torch.autocast("cpu", enabled=False)
    figures = accuracy(model, [batch], classes, Statistics((0.0,), (1.0,)), world, autocast)
    assert ("acc5" in figures) == (classes > 5)
    assert accuracy_text(figures) == text
