"""How well a detector finds objects: figures of a set, and its worst pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from convmae.data import normalise
from convmae.data.objects.shapes import shape_mask
from convmae.records.confusion import confusion_picture
from convmae.records.evaluation import EvaluationDetails
from convmae.records.object_pictures import ComparedObjects, DrawnObjects, object_sheet
from convmae.tasks.detection_steps import canvas, detections
from convmae.tasks.measures.average_precision import AveragePrecision
from convmae.tasks.measures.object_confusion import agreement, object_confusion
from convmae.tasks.measures.worst import Worst

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from convmae.data import Batch, Failure, Statistics
    from convmae.data.objects.annotations import ObjectPicture
    from convmae.data.objects.open import ObjectSource
    from convmae.training.distributed import World

LIKELY = 0.5  # the least score of what is drawn, and counted in a confusion matrix
NOTHING = "nothing"  # what a confusion matrix calls its last row and column


@dataclass
class DetectionFigures:
    """What an evaluation came to, over all processes.

    Attributes:
        scores: by the names of `convmae.records.scores`, in per cent.
        by_class: of each class by its name `box_ap` and `mask_ap`.
        confusion: int64 `[K + 1, K + 1]`, see `object_confusion`; of scores of 0.5 and more.
        worst: the worst pictures by the F1 score of the same detections, the worst first.
    """

    scores: dict[str, float]
    by_class: dict[str, dict[str, float]]
    confusion: Tensor
    worst: list[tuple[float, ComparedObjects]] = field(default_factory=list)


@torch.no_grad()
def evaluate_detections(
    model: Any,
    batches: Iterable[Batch],
    source: ObjectSource,
    masks: bool,
    statistics: Statistics,
    padding: str,
    world: World,
    autocast: torch.autocast,
    failures: list[Failure],
) -> DetectionFigures:
    """Finds the objects of pictures, and compares them with those that are annotated.

    Args:
        model: a `Detector`.
        batches: of `source`.
        source: the pictures, and what is true of them.
        masks: whether masks are compared as well as boxes.
        statistics, padding, world, autocast: how pictures are seen; see `canvas`.
        failures: the pictures that this process could not read are added here.
    """
    pictures, classes = source.annotations.pictures, len(source.annotations.classes)
    measures = AveragePrecision(source.annotations, masks)
    confusion = torch.zeros(classes + 1, classes + 1, dtype=torch.int64)
    worst: Worst[ComparedObjects] = Worst()
    before, was_training = len(failures), model.training
    model.eval()
    for batch in batches:
        failures += batch.failures
        images = normalise(batch.images.to(world.device), *statistics)
        images = canvas(images, batch.targets, statistics, padding)
        found = detections(model, images, batch.targets, padding, autocast)
        for (_, place), each in zip(batch.keys.tolist(), found):
            if each is None:
                continue
            measures.update(place, each)
            matrix = object_confusion(each, pictures[place], classes, LIKELY)
            confusion += matrix
            score = agreement(matrix)
            if score is not None and worst.wants(score):
                worst.keep(score, compared(source, place, each, masks, f": F1 {score:.0f} %"))
    model.train(was_training)
    scores, by_class = measures.compute(world)
    unreadable = round(world.mean(float(len(failures) - before))[0] * world.size)
    scores |= {"unreadable": unreadable} if unreadable else {}
    confusion = torch.stack(world.gather(confusion)).sum(0)
    return DetectionFigures(scores, by_class, confusion, worst.of_all(world))


def compared(
    source: ObjectSource, place: int, found: dict[str, Tensor], masks: bool, more: str = ""
) -> ComparedObjects:
    """Picture `place` of a source with its true objects and the likely ones of those found.

    Args:
        source, place: the picture.
        found: its detections, in its own pixels.
        masks: whether masks are drawn.
        more: what its caption has behind its name.

    Raises:
        UnreadableError: the picture cannot be decoded.
    """
    photos: Any = source.photos
    return ComparedObjects(
        photos.load(place),
        true_objects(photos.target(place), masks),
        found_objects(found, LIKELY),
        photos.name(place).removeprefix(source.root) + more,
    )


def true_objects(objects: ObjectPicture, masks: bool) -> DrawnObjects:
    """What is annotated of a picture, to be drawn; without crowds."""
    objects = objects.only(~objects.crowd)
    made = None
    if masks and len(objects):
        each = [torch.from_numpy(shape_mask(shape, objects.size)) for shape in objects.shapes]
        made = torch.stack(each).bool()
    return DrawnObjects(torch.from_numpy(objects.boxes), torch.from_numpy(objects.labels), made)


def found_objects(found: dict[str, Tensor], least: float) -> DrawnObjects:
    """Detections of at least some score, to be drawn."""
    kept = found["scores"] >= least
    masks = found["masks"][kept][:, 0].cpu() if "masks" in found else None
    boxes, labels, scores = (found[name][kept].cpu() for name in ("boxes", "labels", "scores"))
    return DrawnObjects(boxes, labels, masks, scores)


def details(found: DetectionFigures, classes: Sequence[str], step: int) -> EvaluationDetails:
    """Tables and pictures of an evaluation, for the page of a run."""
    kinds = ("box", "mask") if "mask_ap" in found.scores else ("box",)
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar")
    columns = ["", "AP", "AP50", "AP75", "small", "medium", "large", "recall"]
    whole = [
        ["boxes" if kind == "box" else "masks"]
        + [_percent(found.scores.get(f"{kind}_{name}")) for name in names]
        for kind in kinds
    ]
    each = [
        [name, *(_percent(values.get(f"{kind}_ap")) for kind in kinds)]
        for name, values in found.by_class.items()
    ]
    pictures = {}
    if int(found.confusion.sum()):
        title = f"Objects by true and found class (scores from {LIKELY}, IoU of boxes from 0.5)"
        unit = "share of the objects of the true class"
        pictures[title] = confusion_picture(found.confusion, [*classes, NOTHING], unit)
    if found.worst:
        sheet = object_sheet([one for _, one in found.worst], classes)
        pictures["The worst pictures"] = sheet
    return EvaluationDetails(
        step,
        [
            ("Average precision as COCO defines it, in per cent", columns, whole),
            (
                "Average precision of each class, in per cent",
                ["class", *(f"{kind} AP" for kind in kinds)],
                each,
            ),
        ],
        pictures,
        found.scores | {"classes": found.by_class, "confusion": found.confusion.tolist()},
    )


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"
