"""Average precision of a detector on a split of a data set, and `convmae detect evaluate`."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any

from convmae.commands.detection import load_detector
from convmae.commands.results import named_failures, print_uncounted, write_result
from convmae.data.objects.open import open_objects
from convmae.data.objects.transforms import FitTransform
from convmae.records.scores import scores_text
from convmae.tasks.accuracy import check_channels
from convmae.tasks.detect import match_objects
from convmae.tasks.detection_evaluation import evaluate_detections
from convmae.training.distributed import join

if TYPE_CHECKING:
    from convmae.config import DetectEvaluateConfig
    from convmae.data import Failure


def detect_evaluate(config: DetectEvaluateConfig) -> dict[str, Any]:
    """The average precision of a detector on a split, as COCO defines it, in per cent.

    Returns:
        `box_ap`, `box_ap50`, `box_ap75`, `box_ap_small`, `_medium`, `_large`, `box_ar`; the same
        with `mask_` of a detector with masks on data with masks; `classes`, the first of both of
        each class; `images`, `images_per_s`, `checkpoint`, `model`, and `notes`, what is to be
        known of annotations and classes; where there are any, `unreadable` and `failures`. Written
        to `config.output` as JSON too, if that is given.

    Raises:
        OptionError (a ValueError): an option cannot work, the checkpoint is no detector, or the
            data have classes that it does not know.
        convmae.data.DataError (a ValueError): no such data, or annotations that cannot be used.
    """
    config.validate()
    with join(config.device, "auto") as world:
        loaded = load_detector(config, world.device)
        reading, notes = config.reading.over(loaded.weights.reading)
        source = open_objects(
            config.data_path,
            config.split,
            config.object_options(config.split),
            reading,
            config.max_unreadable,
        )
        masks = loaded.model.masks and source.annotations.has_masks
        if masks:
            source.annotations.drop_without_masks()
        check_channels(source, loaded.model, config.data_path)
        data, of = f"--data_path {config.data_path!r}", f"--checkpoint {config.checkpoint!r}"
        notes += [*source.notes, *match_objects(source, loaded.classes, data, of)]
        if loaded.model.masks and not masks:
            notes.append(f"{source.annotations.where} has no masks: boxes alone are measured")
        batches = source.evaluation_batches(
            FitTransform(loaded.size),
            config.batch_size,
            rank=world.rank,
            world=world.size,
            workers=source.workers if config.num_workers is None else config.num_workers,
            pin=world.device.type == "cuda",
        )
        began = time.perf_counter()
        failures: list[Failure] = []
        found = evaluate_detections(
            loaded.model,
            world.together(batches),
            source,
            masks,
            loaded.statistics,
            loaded.padding,
            world,
            loaded.autocast(),
            failures,
        )
        seconds = time.perf_counter() - began
        result: dict[str, Any] = found.scores | {
            "classes": found.by_class,
            "confusion": found.confusion.tolist(),
            "images": source.pictures - int(found.scores.get("unreadable", 0)),
            "images_per_s": round(source.pictures / seconds, 2),
            "model": loaded.weights.model,
            "checkpoint": str(loaded.weights.path),
            "notes": [note.removeprefix("note: ") for note in notes],
        }
        if failures:
            result["failures"] = named_failures(failures)
        if config.output and world.main:
            write_result(result, config.output)
        return result


def main(config: DetectEvaluateConfig) -> int:
    """The command: `detect_evaluate`, and its figures as text; returns the exit status."""
    result = detect_evaluate(config)
    if int(os.environ.get("RANK", "0")) == 0:
        for note in result["notes"]:
            print(f"note: {note}", file=sys.stderr)
        told = scores_text(result) or "no object to compare with"
        print(f"{told} on {result['images']} pictures, {result['images_per_s']:.1f} images/s")
        for name, values in result["classes"].items():
            texts = [f"{key.replace('_ap', '')} AP {value:.2f}" for key, value in values.items()]
            print(f"  {name}: {', '.join(texts) or 'no object'}")
        print_uncounted(result)
    return 0
