"""How well a segmenter tells classes: figures of a set, and its worst pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from convmae.config.label_maps import IGNORED
from convmae.data import normalise
from convmae.data.segment_transforms import fitted_size
from convmae.records.confusion import confusion_picture
from convmae.records.evaluation import EvaluationDetails
from convmae.records.label_pictures import ComparedPicture, comparison_sheet
from convmae.tasks.measures.label_measures import LabelMeasures, confusion_matrix, figures
from convmae.tasks.measures.small_targets import SmallTargets
from convmae.tasks.measures.worst import Worst

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from convmae.data import Batch, Failure, PhotoSource, Statistics
    from convmae.training.distributed import World

SHOWN_SIDE = 512  # pixels of them at most
MILLION = 1e6
PERCENT = ("miou", "miou_foreground", "macc", "macc_foreground", "aacc", "iou", "niou", "pd")


@dataclass(frozen=True)
class Windows:
    """How a picture is seen.

    Attributes:
        short: pixels that its short side is resized to; None for its own.
        window: height and width of the windows.
        stride: pixels from one to the next; None for two thirds of a window.
    """

    short: int | None
    window: tuple[int, int]
    stride: tuple[int, int] | None = None


@torch.no_grad()
def pixel_logits(model: Any, images: Tensor, windows: Windows) -> Tensor:
    """Logits float32 `[N, K, H, W]` of every pixel of normalised images `[N, C, H, W]`.

    The images are resized (bilinear, antialiased), predicted window by window, and the logits
    resized back.
    """
    size = (images.shape[2], images.shape[3])
    seen = size if windows.short is None else fitted_size(size, windows.short)
    resized = images
    if seen != size:
        how: dict[str, Any] = {"mode": "bilinear", "align_corners": False}
        resized = F.interpolate(images, size=seen, antialias=True, **how)
    logits = model.predict(resized, window=windows.window, stride=windows.stride)
    if seen == size:
        return logits
    return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)


@dataclass
class SegmentFigures:
    """What an evaluation came to, over all processes.

    Attributes:
        scores: by the names of `convmae.records.scores` (per cent; `fa` per million pixels), and
            `loss`, the mean cross entropy of the labelled pixels.
        matrix: int64 `[K, K]`, pixels by true (rows) and predicted class.
        by_class: `iou` and `acc` of each class, per cent; NaN where there is no such pixel.
        targets: true targets, where small targets are measured.
        worst: the worst pictures, with their scores, the worst first.
    """

    scores: dict[str, float]
    matrix: Tensor
    by_class: dict[str, list[float]]
    targets: int | None = None
    worst: list[tuple[float, ComparedPicture]] = field(default_factory=list)


@torch.no_grad()
def evaluate_segments(
    model: Any,
    batches: Iterable[Batch],
    num_classes: int,
    windows: Windows,
    statistics: Statistics,
    world: World,
    autocast: torch.autocast,
    source: PhotoSource,
    small_targets: bool = False,
    failures: list[Failure] | None = None,
) -> SegmentFigures:
    """Predicts pictures and compares them with their label maps.

    Fillers, whose label maps are ignored as a whole, count for nothing.

    Args:
        model: a `Segmenter`.
        batches: of `source`, with label maps as targets.
        num_classes: of the model.
        windows, statistics, world, autocast: how pictures are seen.
        source: for the names of pictures.
        small_targets: measure small targets as well.
        failures: the pictures that this process could not read are added here.
    """
    measures = LabelMeasures(num_classes).to(world.device)
    targets = SmallTargets() if small_targets else None
    if targets is not None:
        targets.to(world.device)
    total = torch.zeros(2, dtype=torch.float64)  # loss, pixels
    failures = [] if failures is None else failures
    worst: Worst[ComparedPicture] = Worst()
    before = len(failures)
    was_training = model.training
    model.eval()
    for batch in batches:
        failures += batch.failures
        truth = batch.targets.to(world.device)
        images = normalise(batch.images.to(world.device), *statistics)
        with autocast:
            logits = pixel_logits(model, images, windows).float()
        prediction = logits.argmax(1)
        measures.update(prediction, truth)
        if targets is not None:
            targets.update(prediction, truth)
        entropy = F.cross_entropy(logits, truth, ignore_index=IGNORED, reduction="sum")
        total += torch.tensor([float(entropy), int((truth != IGNORED).sum())])
        _keep_worst(worst, source, batch, prediction, num_classes)
    model.train(was_training)
    scores, by_class = _scores(measures.compute())
    count = None
    if targets is not None:
        found = targets.compute()
        count = int(found["targets"])
        scores = _scores(found)[0] | {"fa": MILLION * found["fa"]} | scores
    loss, pixels, unreadable = world.mean(*total.tolist(), float(len(failures) - before))
    scores["loss"] = loss / max(pixels, 1e-12)
    if unreadable:
        scores["unreadable"] = round(unreadable * world.size)
    matrix = measures_matrix(measures, world)
    return SegmentFigures(scores, matrix, by_class, count, worst.of_all(world))


def measures_matrix(measures: LabelMeasures, world: World) -> Tensor:
    """The confusion matrix of all processes, on the CPU."""
    if not world.parallel:
        return measures.matrix.cpu()
    with measures.sync_context():
        return measures.matrix.cpu()


def _scores(found: dict[str, Any]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Figures of all, and of each class, in per cent."""
    scores = {
        name: 100 * value
        for name, value in found.items()
        if name in PERCENT and not isinstance(value, list)
    }
    lists = {
        name: [100 * v for v in value] for name, value in found.items() if isinstance(value, list)
    }
    return scores, lists


def _keep_worst(
    worst: Worst[ComparedPicture],
    source: PhotoSource,
    batch: Batch,
    prediction: Tensor,
    num_classes: int,
) -> None:
    """Keeps the pictures of a batch with the lowest mean IoU of the classes in them."""
    for place, found in enumerate(prediction):
        truth = batch.targets[place]
        matrix = confusion_matrix(found[None].cpu(), truth[None], num_classes)
        if not int(matrix.sum()):
            continue
        score = 100 * figures(matrix)["miou"]
        if worst.wants(score):
            name = source.photos.name(int(batch.keys[place, 1])).removeprefix(source.root)
            caption = f"{name}: mIoU {score:.1f} %"
            worst.keep(score, _smaller(batch.images[place], truth, found.cpu(), caption))


def _smaller(image: Tensor, truth: Tensor, prediction: Tensor, caption: str) -> ComparedPicture:
    """A picture and its classes, every n-th pixel of them: what is shown needs no more."""
    step = -(-max(truth.shape) // SHOWN_SIDE)
    true, predicted = (part[::step, ::step].byte() for part in (truth, prediction))
    return ComparedPicture(image[:, ::step, ::step].clone(), true, predicted, caption)


def details(found: SegmentFigures, classes: Sequence[str], step: int) -> EvaluationDetails:
    """Tables and pictures of an evaluation, for the page of a run."""
    pixels = found.matrix.sum(1).tolist()
    rows = [
        [
            name,
            _number(found.by_class["iou"][n]),
            _number(found.by_class["acc"][n]),
            f"{pixels[n]:,}",
        ]
        for n, name in enumerate(classes)
    ]
    pictures = {}
    if int(found.matrix.sum()):
        pictures["Confusion matrix"] = confusion_picture(
            found.matrix, classes, "share of the pixels of the true class"
        )
    if found.worst:
        sheet = comparison_sheet([compared for _, compared in found.worst], classes)
        pictures["The worst pictures"] = sheet
    columns = ["class", "IoU, %", "accuracy, %", "pixels"]
    return EvaluationDetails(
        step,
        [("Classes", columns, rows)],
        pictures,
        {"scores": found.scores, "classes": list(classes), "confusion": found.matrix.tolist()},
    )


def _number(value: float) -> str:
    return "" if value != value else f"{value:.2f}"  # NaN: there is no such pixel


def class_table(found: SegmentFigures, classes: Sequence[str]) -> str:
    """A line for each class: IoU and accuracy, in per cent; `-` where there is no such pixel."""
    width = max(5, *(len(name) for name in classes))
    lines = [f"{'class':{width}}     IoU   accuracy"]
    for number, name in enumerate(classes):
        iou, acc = (_number(found.by_class[kind][number]) or "-" for kind in ("iou", "acc"))
        lines.append(f"{name:{width}}  {iou:>6}   {acc:>8}")
    return "\n".join(lines)
