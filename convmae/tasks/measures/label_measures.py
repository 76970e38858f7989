"""How good label maps are: a confusion matrix of pixels, and what follows from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import multiclass_confusion_matrix

from convmae.config.label_maps import IGNORED


class LabelMeasures(Metric):
    """IoU and accuracy of each class over all pixels of a set, and their means.

    A metric of torchmetrics: `compute` gives the figures of all processes together, and
    `merge_state` takes in another one's pixels. Pixels with label 255 count for nothing.

    Args:
        num_classes: `K`.

    Attributes:
        matrix: int64 `[K, K]`: pixels by their true class (rows) and predicted class (columns).
    """

    full_state_update = False
    matrix: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        zeros = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.add_state("matrix", zeros, dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Counts the pixels of a batch.

        Args:
            prediction: classes, int64 `[N, H, W]` in `[0, K)`.
            target: labels, int64 `[N, H, W]` in `[0, K)`, or 255.

        Raises:
            ValueError: the two differ in shape.
        """
        self.matrix += confusion_matrix(prediction, target, self.num_classes)

    def compute(self) -> dict[str, Any]:
        """The `figures` of all pixels so far, of all processes."""
        return figures(self.matrix)


def confusion_matrix(prediction: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """int64 `[K, K]`: pixels by their true class (rows) and predicted class (columns).

    Arguments and errors are those of `LabelMeasures.update`.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction {list(prediction.shape)} and target {list(target.shape)} must have the "
            "same shape"
        )
    return multiclass_confusion_matrix(
        prediction, target, num_classes, ignore_index=IGNORED, validate_args=False
    )


def figures(matrix: Tensor) -> dict[str, Any]:
    """What a confusion matrix of pixels tells, as fractions.

    Args:
        matrix: from `confusion_matrix`.

    Returns:
        Of each class, as lists: `iou`, pixels of the class in both / in either; `acc`, right pixels
        / true pixels of the class. NaN stands for classes that are nowhere: in neither label nor
        prediction (`iou`), in no label (`acc`). Of all: `miou` and `macc`, the means over the
        classes that are not NaN; `aacc`, right pixels / pixels; `miou_foreground` and
        `macc_foreground`, the means without class 0, which is the background or "unlabelled" in
        most sets. `pixels` is how many counted.
    """
    counts = matrix.double().cpu()
    right, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    iou, accuracy = right / (true + predicted - right), right / true  # 0 / 0 is NaN
    return {
        "miou": float(iou.nanmean()),
        "miou_foreground": float(iou[1:].nanmean()),
        "macc": float(accuracy.nanmean()),
        "macc_foreground": float(accuracy[1:].nanmean()),
        "aacc": float(right.sum() / counts.sum()),
        "iou": iou.tolist(),
        "acc": accuracy.tolist(),
        "pixels": int(counts.sum()),
    }
