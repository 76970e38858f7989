"""IoU and accuracy of a segmenter on a split of a data set, and `convmae segment evaluate`."""

from __future__ import annotations

import math
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from convmae.commands.results import named_failures, print_uncounted, write_result
from convmae.commands.segmenting import class_names, load_segmenter, windows_of
from convmae.data import DataError
from convmae.data.label_maps import LabelMapPhotos, open_label_maps
from convmae.data.label_maps.classes import check_largest, told_classes
from convmae.data.label_maps.pairs import survey_label_maps
from convmae.data.segment_transforms import SegmentEvalTransform
from convmae.records.scores import scores_text
from convmae.tasks.accuracy import check_channels
from convmae.tasks.segment import check_classes
from convmae.tasks.segment_evaluation import class_table, evaluate_segments
from convmae.training.distributed import join

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convmae.commands.inference import Loaded
    from convmae.config import SegmentEvaluateConfig
    from convmae.data import Failure, PhotoSource
    from convmae.tasks.segment_evaluation import SegmentFigures
    from convmae.training.distributed import World


def segment_evaluate(config: SegmentEvaluateConfig) -> dict[str, Any]:
    """How well a checkpoint segments the pictures of a split.

    Returns:
        In per cent `miou`, `macc` and `aacc`, the means over classes and the accuracy of pixels,
        `miou_foreground` and `macc_foreground`, those without class 0, `loss`; with small targets
        `iou`, `niou`, `pd` and `fa` (per million pixels) and `targets`; `classes`, of each its
        `iou`, `acc` and `pixels`, and `confusion`, pixels by true and predicted class. A class that
        is in no label map has no `acc`, and counts in no mean of it; one that is not predicted
        either has no `iou`. Further `images`, `images_per_s`, `model`, `checkpoint`, `notes`, and
        where there are any `unreadable`, `failures` and `left_out`. Written to `config.output` as
        JSON too, if that is given.

    Raises:
        OptionError (a ValueError): an option cannot work, the checkpoint is no segmenter, or the
            data have other classes.
        convmae.data.DataError (a ValueError): no such data, or label maps that do not fit.
    """
    config.validate()
    with join(config.device, "auto") as world:
        loaded, learnt = load_segmenter(config, world.device)
        windows = windows_of(config, loaded.model, learnt)
        classes = class_names(loaded)
        source, notes = _open(config, loaded, learnt, world)
        metrics = config.metrics or learnt.get("metrics")
        batches = source.evaluation_batches(
            SegmentEvalTransform(loaded.model.img_size),
            config.batch_size,
            rank=world.rank,
            world=world.size,
            workers=source.workers if config.num_workers is None else config.num_workers,
            pin=world.device.type == "cuda",
        )
        began = time.perf_counter()
        failures: list[Failure] = []
        found = evaluate_segments(
            loaded.model,
            world.together(batches),
            len(classes),
            windows,
            loaded.statistics,
            world,
            loaded.autocast(),
            source,
            metrics == "small-targets",
            failures,
        )
        result = _figures(found, classes) | {
            "images": source.pictures - int(found.scores.get("unreadable", 0)),
            "images_per_s": round(source.pictures / (time.perf_counter() - began), 2),
            "model": loaded.weights.model,
            "checkpoint": str(loaded.weights.path),
            "notes": notes,
        }
        if failures:
            result["failures"] = named_failures(failures)
        if source.left_out:
            result["left_out"] = [str(left_out) for left_out in source.left_out]
        if config.output and world.main:
            write_result(result, config.output)
        return result | {"table": class_table(found, classes)}


def _open(
    config: SegmentEvaluateConfig, loaded: Loaded, learnt: dict[str, Any], world: World
) -> tuple[PhotoSource, list[str]]:
    """The pictures with their label maps, all of them checked; and what to tell about it."""
    classes, where = class_names(loaded), f"--checkpoint {config.checkpoint!r}"
    options = config.label_maps_over(learnt)
    reading, notes = config.reading.over(loaded.weights.reading)
    source = open_label_maps(
        config.data_path,
        config.split,
        options,
        reading,
        max_unreadable=config.max_unreadable,
        undivided=True,
    )
    check_channels(source, loaded.model, config.data_path)
    photos = source.photos
    assert isinstance(photos, LabelMapPhotos)
    told = told_classes(options, photos.reading)
    data = f"--data_path {config.data_path!r}"
    if told is not None:
        check_classes(classes, told, where, f"the label maps of {data}")
    problem = ""
    if world.main:
        try:
            survey = survey_label_maps(source, data)
            check_largest(survey, len(classes), data, photos.reading)
        except DataError as error:
            problem = error.with_flags
    problem = world.share(problem)
    if problem:
        raise DataError(problem)
    photos.count = len(classes)
    own = config.label_options()
    taken = {n: v for n, v in options.label_options().items() if n not in own}
    if taken:
        words = ", ".join(f"{name} {value}" for name, value in taken.items())
        notes.append(f"note: as the run of the checkpoint was told: {words}")
    return source, [source.description, *notes]


def _figures(found: SegmentFigures, classes: Sequence[str]) -> dict[str, Any]:
    """The figures as JSON has them; None in place of NaN."""
    pixels = found.matrix.sum(1).tolist()
    by_class = {
        name: {
            "iou": _known(found.by_class["iou"][number]),
            "acc": _known(found.by_class["acc"][number]),
            "pixels": pixels[number],
        }
        for number, name in enumerate(classes)
    }
    figures: dict[str, Any] = {name: _known(value) for name, value in found.scores.items()}
    if found.targets is not None:
        figures["targets"] = found.targets
    return figures | {"classes": by_class, "confusion": found.matrix.tolist()}


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(known: float | None) -> float:
    return math.nan if known is None else known


def main(config: SegmentEvaluateConfig) -> int:
    """The command: `segment_evaluate`, and its figures; returns the exit status."""
    result = segment_evaluate(config)
    if int(os.environ.get("RANK", "0")) == 0:
        for note in result["notes"]:
            print(note, file=sys.stderr)
        print(result["table"])
        print(
            f"{scores_text(result)}, loss {_number(result['loss']):.4f} on {result['images']} "
            f"pictures, {result['images_per_s']:.1f} images/s"
        )
        print_uncounted(result)
    return 0
