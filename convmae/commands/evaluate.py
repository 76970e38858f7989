"""Accuracy of a classifier on a split of a data set, and `convmae evaluate`."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any

from convmae.commands.inference import load
from convmae.commands.results import named_failures, print_uncounted, write_result
from convmae.config import OptionError
from convmae.data import EvalTransform, open_source
from convmae.models import ConvViT
from convmae.models.cnn.classifier import TimmClassifier
from convmae.tasks.accuracy import accuracy, check_channels
from convmae.tasks.matching import match_labels
from convmae.training.distributed import join
from convmae.training.run import accuracy_text

if TYPE_CHECKING:
    from convmae.config import EvaluateConfig
    from convmae.data import Failure


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """The accuracy of a checkpoint on a split.

    Returns:
        `acc1` in per cent, `acc5` too where there are more than 5 classes, `loss`, `images`,
        `images_per_s`, `checkpoint`, `model`, and `notes`, what is to be known of how classes were
        matched; where there are any, `unreadable`, how many pictures could not be read, `failures`,
        the first of them, and `left_out`, what is no picture. Written to `config.output` as JSON
        too, if that is given.

    Raises:
        OptionError (a ValueError): an option cannot work, the checkpoint is no classifier, or the
            data have classes that it does not know.
        convmae.data.DataError (a ValueError): no such data.
    """
    config.validate()
    with join(config.device, "auto") as world:
        loaded = load(config, world.device)
        weights, model = loaded.weights, loaded.model
        if not isinstance(model, ConvViT | TimmClassifier):
            raise OptionError(
                f"--checkpoint {config.checkpoint!r} is a {type(model).__name__}, which does not "
                "classify; expected what convmae finetune or linprobe wrote"
            )
        if isinstance(model, TimmClassifier) and model.num_classes == 0:
            raise OptionError(
                f"--checkpoint {config.checkpoint!r} is a {model.name} without a classifier; "
                "expected what convmae finetune or linprobe wrote"
            )
        nb_classes = int(model.config["num_classes"])
        reading, notes = config.reading.over(weights.reading)
        for note in notes if world.main else ():
            print(note, file=sys.stderr)
        source = open_source(
            config.data_path,
            split=config.split,
            max_unreadable=config.max_unreadable,
            undivided=True,
            reading=reading,
            choice=config.picture_choice,
        )
        data, of = f"--data_path {config.data_path!r}", f"--checkpoint {config.checkpoint!r}"
        check_channels(source, model, config.data_path)
        notes = match_labels(source, weights.classes, nb_classes, data, of)
        workers = source.workers if config.num_workers is None else config.num_workers
        batches = source.evaluation_batches(
            EvalTransform(model.img_size, config.crop_pct),
            config.batch_size,
            rank=world.rank,
            world=world.size,
            workers=workers,
            pin=world.device.type == "cuda",
        )
        began = time.perf_counter()
        failures: list[Failure] = []
        figures = accuracy(
            model,
            world.together(batches),
            nb_classes,
            loaded.statistics,
            world,
            loaded.autocast(),
            failures,
        )
        seconds = time.perf_counter() - began
        result: dict[str, Any] = figures | {
            "images": source.samples_per_epoch - int(figures.get("unreadable", 0)),
            "images_per_s": round(source.samples_per_epoch / seconds, 2),
            "model": weights.model,
            "checkpoint": str(weights.path),
            "notes": notes,
        }
        if failures:
            result["failures"] = named_failures(failures)
        if source.left_out:
            result["left_out"] = [str(left_out) for left_out in source.left_out]
        if config.output and world.main:
            write_result(result, config.output)
        return result


def main(config: EvaluateConfig) -> int:
    """The command: `evaluate`, and its figures in a line; returns the exit status."""
    result = evaluate(config)
    if int(os.environ.get("RANK", "0")) == 0:
        for note in result["notes"]:
            print(note)
        print(
            f"{accuracy_text(result)}, loss "
            f"{result['loss']:.4f} on {result['images']} pictures, "
            f"{result['images_per_s']:.1f} images/s"
        )
        print_uncounted(result)
    return 0
