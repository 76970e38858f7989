"""Average precision of detections as COCO defines it, computed by pycocotools."""

from __future__ import annotations

import io
import math
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

import numpy as np

from convmae.data.objects.coco import as_coco
from convmae.data.objects.shapes import encoded_mask

if TYPE_CHECKING:
    from torch import Tensor

    from convmae.data.objects.annotations import Annotations
    from convmae.training.distributed import World

# Of pycocotools' summary, by their places there.
PLACES = {"ap": 0, "ap50": 1, "ap75": 2, "ap_small": 3, "ap_medium": 4, "ap_large": 5, "ar": 8}
ALL_AREAS, MOST_DETECTIONS = 0, -1  # places in pycocotools' axes: any size, 100 detections


def result_entries(
    number: int, detections: dict[str, Tensor], category_ids: list[int]
) -> list[dict[str, Any]]:
    """Detections of a picture as COCO's results have them; a mask is a run-length code.

    Args:
        number: COCO's id of the picture.
        detections: boxes `[n, 4]`, labels, scores and, if there are, masks `[n, 1, H, W]`.
        category_ids: COCO's id of each label.
    """
    boxes, labels = detections["boxes"].double().cpu(), detections["labels"].tolist()
    sides = (boxes[:, 2:] - boxes[:, :2]).tolist()
    corners, scores = boxes[:, :2].tolist(), detections["scores"].double().tolist()
    entries: list[dict[str, Any]] = [
        {
            "image_id": number,
            "category_id": category_ids[label],
            "bbox": [*corner, *side],
            "score": score,
        }
        for corner, side, label, score in zip(corners, sides, labels, scores)
    ]
    if "masks" in detections:
        for entry, mask in zip(entries, detections["masks"].cpu().numpy()):
            entry["segmentation"] = encoded_mask(mask[0])
    return entries


class AveragePrecision:
    """Average precision of boxes, and of masks where they are asked for, in per cent.

    Args:
        annotations: what is true.
        masks: whether masks are compared as well.
    """

    def __init__(self, annotations: Annotations, masks: bool) -> None:
        self.annotations, self.masks = annotations, masks
        self.seen: list[int] = []  # places of the pictures
        self.entries: list[dict[str, Any]] = []

    def update(self, place: int, detections: dict[str, Tensor]) -> None:
        """Takes the detections of picture `place` of the annotations, in its own pixels."""
        number = self.annotations.pictures[place].number
        self.seen.append(place)
        self.entries += result_entries(number, detections, self.annotations.category_ids)

    def compute(self, world: World) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """The figures over the pictures of all processes, in every process.

        Returns:
            `box_ap` (the mean over IoU from 0.5 to 0.95 and over the classes), `box_ap50`,
            `box_ap75`, `box_ap_small`, `_medium`, `_large` (areas below 32², 96² pixels, above),
            `box_ar` (recall with 100 detections), the same with `mask_`; and of each class the
            first of both. What there is nothing of is left out.
        """
        seen = sorted({place for part in world.gather(self.seen) for place in part})
        # In one order, whatever the number of processes: equal scores are sorted as they come.
        parts = world.gather(self.entries)
        entries = sorted((e for part in parts for e in part), key=lambda e: e["image_id"])
        found = self._compute(seen, entries) if world.main else None
        return world.share(found)

    def _compute(
        self, seen: list[int], entries: list[dict[str, Any]]
    ) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        figures: dict[str, float] = {}
        of_classes: dict[str, dict[str, float]] = {name: {} for name in self.annotations.classes}
        for name, kind in (("box", "bbox"), ("mask", "segm"))[: 2 if self.masks else 1]:
            whole, each = compare(as_coco(self.annotations, seen), entries, kind)
            figures |= {f"{name}_{key}": value for key, value in whole.items()}
            for class_name, value in zip(self.annotations.classes, each):
                if not math.isnan(value):
                    of_classes[class_name][f"{name}_ap"] = value
        return figures, of_classes


def compare(
    truth: dict[str, Any], entries: list[dict[str, Any]], kind: str
) -> tuple[dict[str, float], list[float]]:
    """pycocotools' summary of results, in per cent, and the average precision of each class.

    Args:
        truth: COCO's JSON.
        entries: COCO's results.
        kind: `bbox` or `segm`. Areas of masks are those of their pixels, not of their boxes.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with redirect_stdout(io.StringIO()):  # it tells of every step
        coco = COCO()
        coco.dataset = truth | {"info": {}}
        coco.createIndex()
        if kind == "segm":
            entries = [{k: v for k, v in entry.items() if k != "bbox"} for entry in entries]
        results = coco.loadRes([dict(entry) for entry in entries]) if entries else COCO()
        if not entries:
            results.dataset = truth | {"annotations": []}
            results.createIndex()
        evaluation = COCOeval(coco, results, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # -1 stands for "there is nothing of this kind"
    figures = {name: 100 * float(evaluation.stats[place]) for name, place in PLACES.items()}
    precision = evaluation.eval["precision"]  # [IoUs, recalls, classes, areas, detections]
    each = []
    for place in range(precision.shape[2]):
        known = precision[:, :, place, ALL_AREAS, MOST_DETECTIONS]
        known = known[known > -1]
        each.append(100 * float(known.mean()) if known.size else float(np.nan))
    order = {number: place for place, number in enumerate(evaluation.params.catIds)}
    in_order = [each[order[entry["id"]]] for entry in truth["categories"]]
    return {name: value for name, value in figures.items() if value >= 0}, in_order
