"""Average precision against torchmetrics, which asks pycocotools in its own way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from convmae.data.left_out import LeftOut
from convmae.data.objects.annotations import Annotations, ObjectPicture
from convmae.data.objects.shapes import encoded_mask
from convmae.tasks.measures.average_precision import AveragePrecision
from convmae.training.distributed import World

ALONE = World(0, 1, torch.device("cpu"), "single")
SIDE, CLASSES = 80, ["a", "b", "never there"]


def rectangles(boxes: torch.Tensor) -> torch.Tensor:
    """Masks of boxes, bool `[n, 1, SIDE, SIDE]`."""
    masks = torch.zeros(len(boxes), 1, SIDE, SIDE, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes.round().int().tolist()):
        mask[0, top:bottom, left:right] = True
    return masks


def random_boxes(generator: torch.Generator, count: int) -> torch.Tensor:
    corner = torch.rand(count, 2, generator=generator) * 25
    side = torch.rand(count, 2, generator=generator) * 50 + 4
    return torch.cat([corner, corner + side], 1).round()


@pytest.fixture(scope="module")
def case() -> tuple[Annotations, list[dict[str, Any]]]:
    """Pictures with true objects, a crowd among them, and detections near most of them."""
    generator = torch.Generator().manual_seed(3)
    pictures, found = [], []
    for number in range(12):
        count = 1 + number % 4
        boxes = random_boxes(generator, count)
        labels = torch.randint(2, (count,), generator=generator)
        masks = rectangles(boxes)
        crowd = np.zeros(count, dtype=bool)
        crowd[:1] = number == 3
        pictures.append(
            ObjectPicture(
                f"{number}.png",
                (SIDE, SIDE),
                100 + number,
                boxes.double().numpy(),
                labels.numpy(),
                crowd,
                masks.sum((1, 2, 3)).double().numpy(),
                [encoded_mask(mask[0].numpy()) for mask in masks],
            )
        )
        moved = boxes + torch.randint(-3, 4, boxes.shape, generator=generator)
        guessed = torch.cat([moved, random_boxes(generator, 2)]).clamp(0, SIDE)
        guesses = torch.cat([labels, torch.randint(2, (2,), generator=generator)])
        scores = torch.rand(len(guessed), generator=generator)
        found.append(
            {"boxes": guessed, "labels": guesses, "scores": scores, "masks": rectangles(guessed)}
        )
    left_out = LeftOut()
    return Annotations("made", CLASSES, [7, 3, 9], pictures, left_out, left_out), found


def measured(annotations: Annotations, found: list[dict[str, Any]], masks: bool = True) -> Any:
    measures = AveragePrecision(annotations, masks)
    for place, detections in enumerate(found):
        measures.update(place, detections)
    return measures.compute(ALONE)


@pytest.mark.parametrize(("name", "kind"), [("box", "bbox"), ("mask", "segm")])
def test_equals_torchmetrics(case, name, kind):
    from torchmetrics.detection import MeanAveragePrecision

    annotations, found = case
    figures, of_classes = measured(annotations, found)
    # Its own thresholds are rounded to float32, and overlaps and recalls here lie on some exactly.
    metric = MeanAveragePrecision(
        iou_type=kind,
        class_metrics=True,
        iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
        rec_thresholds=np.linspace(0.0, 1.0, 101).tolist(),
    )
    for picture, detections in zip(annotations.pictures, found):
        boxes = torch.from_numpy(picture.boxes).float()
        truth = {
            "boxes": boxes,
            "labels": torch.from_numpy(picture.labels),
            "masks": rectangles(boxes)[:, 0],
            "iscrowd": torch.from_numpy(picture.crowd).long(),
            "area": torch.from_numpy(picture.areas),
        }
        metric.update([detections | {"masks": detections["masks"][:, 0]}], [truth])
    expected = metric.compute()
    names = {"ap": "map", "ap50": "map_50", "ap75": "map_75", "ar": "mar_100"}
    names |= {f"ap_{size}": f"map_{size}" for size in ("small", "medium")}
    for ours, theirs in names.items():
        assert figures[f"{name}_{ours}"] == pytest.approx(100 * float(expected[theirs]), abs=1e-4)
    assert 5 < figures[f"{name}_ap"] < 95
    assert f"{name}_ap_large" not in figures  # there is no such object
    each = 100 * expected["map_per_class"]
    assert of_classes["a"][f"{name}_ap"] == pytest.approx(float(each[0]), abs=1e-4)
    assert of_classes["b"][f"{name}_ap"] == pytest.approx(float(each[1]), abs=1e-4)
    assert of_classes["never there"] == {}


def test_perfect_and_absent_detections(case):
    annotations, found = case
    perfect = [
        {
            "boxes": torch.from_numpy(picture.boxes),
            "labels": torch.from_numpy(picture.labels),
            "scores": torch.ones(len(picture)),
            "masks": rectangles(torch.from_numpy(picture.boxes)),
        }
        for picture in annotations.pictures
    ]
    figures, _ = measured(annotations, perfect)
    assert figures["box_ap"] == figures["mask_ap"] == pytest.approx(100)
    nothing = [{name: value[:0] for name, value in each.items()} for each in found]
    figures, _ = measured(annotations, nothing, masks=False)
    assert figures["box_ap"] == 0
    assert "mask_ap" not in figures


def test_pictures_that_were_not_looked_at_do_not_count(case):
    annotations, found = case
    half, _ = measured(annotations, found[:6])
    only = Annotations(
        "made",
        CLASSES,
        annotations.category_ids,
        annotations.pictures[:6],
        annotations.dropped,
        annotations.clipped,
    )
    assert half == measured(only, found[:6])[0]
    assert half != measured(annotations, found)[0]
