"""How well small targets are found: IoU, nIoU, Pd and Fa, as in infrared target detection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

from convmae.config.label_maps import IGNORED

if TYPE_CHECKING:
    import numpy as np

NEAR = 3.0  # pixels; a centroid has to be closer than this
_COUNTS = ("both", "either", "targets", "found", "false_pixels", "pixels", "pictures")


class SmallTargets(Metric):
    """IoU, nIoU, Pd and Fa of targets against background, with BasicIRSTD's definitions.

    A target is a group of pixels above 0 that touch each other, at corners too; classes are not
    told apart. Each true target, in raster order of their first pixels, is found by the first
    predicted one not yet taken whose centroid is closer than 3 pixels; whether they overlap does
    not matter. Pixels with label 255 belong to nothing and are not counted.

    Other codes count otherwise: DNANet's resizes to 256 x 256, and leaves out of Fa every predicted
    target that is as large as any found one, so that its Fa is lower.

    A metric of torchmetrics: `compute` gives the figures of all processes together, and
    `merge_state` takes in another one's pictures. It needs scikit-image.
    """

    full_state_update = False
    iou_of_pictures: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in _COUNTS:
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        zero = torch.zeros((), dtype=torch.float64)
        self.add_state("iou_of_pictures", zero, dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Counts the targets of a batch.

        Args:
            prediction: bool or classes, int64 `[N, H, W]`; a target is what is above 0.
            target: labels, `[N, H, W]`; a target is what is above 0 and not 255.

        Raises:
            ValueError: the two differ in shape.
        """
        if prediction.shape != target.shape or prediction.dim() != 3:
            raise ValueError(
                f"prediction {list(prediction.shape)} and target {list(target.shape)} must have "
                "the same shape [N, H, W]"
            )
        for found, truth in zip(prediction.cpu(), target.cpu()):
            labelled = truth != IGNORED
            self._count((found > 0) & labelled, (truth > 0) & labelled, int(labelled.sum()))

    def _count(self, found: Tensor, truth: Tensor, pixels: int) -> None:
        """Adds one picture, bool `[H, W]` twice; one that is ignored as a whole is no picture."""
        if not pixels:
            return
        both, either = int((found & truth).sum()), int((found | truth).sum())
        targets, hits, false_pixels = match_targets(found.numpy(), truth.numpy())
        counted = (both, either, targets, hits, false_pixels, pixels, 1)
        for name, value in zip(_COUNTS, counted, strict=True):
            setattr(self, name, getattr(self, name) + value)
        self.iou_of_pictures = self.iou_of_pictures + both / max(either, 1)

    def compute(self) -> dict[str, Any]:
        """The figures of all pictures so far, of all processes, as fractions.

        Returns:
            `iou`: pixels that are target in both / in either, over all pictures together. `niou`:
            the mean over pictures of the same of each, 0 where there is nothing in either. `pd`:
            found targets / true targets. `fa`: pixels of predicted targets that found nothing / all
            pixels; papers print it times 1e6. `targets` and `pictures`: how many counted. NaN where
            there is nothing to divide by.
        """
        n = {name: int(getattr(self, name)) for name in _COUNTS}
        return {
            "iou": _share(n["both"], n["either"]),
            "niou": _share(float(self.iou_of_pictures), n["pictures"]),
            "pd": _share(n["found"], n["targets"]),
            "fa": _share(n["false_pixels"], n["pixels"]),
            "targets": n["targets"],
            "pictures": n["pictures"],
        }


def match_targets(found: np.ndarray, truth: np.ndarray) -> tuple[int, int, int]:
    """True targets, how many of them are found, and pixels of predicted targets that find nothing.

    Args:
        found: bool `[H, W]`, what was predicted.
        truth: bool `[H, W]`.
    """
    from skimage.measure import label, regionprops

    of_truth = regionprops(label(truth, connectivity=2))
    unmatched = regionprops(label(found, connectivity=2))
    hits = 0
    for target in of_truth:
        row, column = target.centroid
        for number, other in enumerate(unmatched):
            down, right = other.centroid[0] - row, other.centroid[1] - column
            if (down**2 + right**2) ** 0.5 < NEAR:
                del unmatched[number]
                hits += 1
                break
    return len(of_truth), hits, sum(int(other.area) for other in unmatched)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
