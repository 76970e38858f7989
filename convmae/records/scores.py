"""What evaluations measure: the names of figures in a log, and how people read them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from convmae.records.wording import is_number

if TYPE_CHECKING:
    from collections.abc import Mapping


class Score(NamedTuple):
    """A figure of an evaluation; how to call it, and its unit."""

    label: str
    unit: str = "%"
    chart: str = ""


FALSE_ALARMS = "per million pixels"
# In the order in which they are told. The first that an evaluation has is what decides which
# weights are the best.
SCORES: dict[str, Score] = {
    "acc1": Score("accuracy", chart="Accuracy"),
    "acc5": Score("best of 5", chart="Accuracy"),
    "miou": Score("mIoU", chart="Intersection over union"),
    "miou_foreground": Score("mIoU without class 0", chart="Intersection over union"),
    "iou": Score("IoU of targets", chart="Intersection over union"),
    "niou": Score("nIoU", chart="Intersection over union"),
    "macc": Score("mean accuracy of classes", chart="Accuracy of pixels"),
    "aacc": Score("accuracy of pixels", chart="Accuracy of pixels"),
    "box_ap": Score("box AP", chart="Average precision of boxes"),
    "box_ap50": Score("box AP50", chart="Average precision of boxes"),
    "box_ap75": Score("box AP75", chart="Average precision of boxes"),
    "mask_ap": Score("mask AP", chart="Average precision of masks"),
    "mask_ap50": Score("mask AP50", chart="Average precision of masks"),
    "mask_ap75": Score("mask AP75", chart="Average precision of masks"),
    "pd": Score("Pd, targets found", chart="Targets found"),
    "fa": Score("Fa, false alarms", FALSE_ALARMS, chart="False alarms"),
}
DRAWN_LABELS = {"acc1": "top 1", "acc5": "top 5"}  # where a chart has other words


def main_score(figures: Mapping[str, Any]) -> str | None:
    """The name of the figure that decides which weights are the best; None without one."""
    return next((name for name in SCORES if is_number(figures.get(name))), None)


def scores_text(figures: Mapping[str, Any]) -> str:
    """`mIoU 61.20 %, mean accuracy of classes 70.11 %, ...`."""
    told = [
        f"{score.label} {figures[name]:.2f} {score.unit}"
        for name, score in SCORES.items()
        if is_number(figures.get(name))
    ]
    return ", ".join(told)
