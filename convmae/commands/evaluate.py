"""Accuracy of a classifier on a split of a data set, and `convmae evaluate`."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from convmae.config import OptionError, for_option
from convmae.data import EvalTransform, open_source
from convmae.files import replacing
from convmae.models import ConvViT
from convmae.tasks.accuracy import accuracy, check_channels, check_labels
from convmae.training.distributed import join
from convmae.training.machine import pick_dtype
from convmae.weights.checkpoint import open_weights

if TYPE_CHECKING:
    from convmae.config import EvaluateConfig

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """The accuracy of a checkpoint on a split.

    Returns:
        `acc1` and `acc5` in per cent, `loss`, `images`, `images_per_s`, `checkpoint` and `model`;
        written to `config.output` as JSON too, if that is given.

    Raises:
        OptionError (a ValueError): an option cannot work, or the checkpoint is no classifier.
        convmae.data.DataError (a ValueError): no such data.
    """
    config.validate()
    with join(config.device, "auto") as world:
        with for_option("checkpoint"):
            weights = open_weights(config.checkpoint)
            model: Any = weights.build_model(world.device)
            statistics = weights.statistics
        if not isinstance(model, ConvViT):
            raise OptionError(
                f"--checkpoint {config.checkpoint!r} is a {type(model).__name__}, which does not "
                "classify; expected what convmae finetune or linprobe wrote"
            )
        nb_classes = int(model.config["num_classes"])
        reading, notes = config.reading.over(weights.reading)
        for note in notes if world.main else ():
            print(note, file=sys.stderr)
        source = open_source(
            config.data_path,
            split=config.split,
            max_unreadable=config.max_unreadable,
            reading=reading,
        )
        check_labels(source, nb_classes, f"--data_path {config.data_path!r}")
        check_channels(source, model, config.data_path)
        dtype, _ = pick_dtype(config.amp, world.device)
        half = dtype != torch.float32
        autocast = torch.autocast(world.device.type, dtype=dtype if half else None, enabled=half)
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
        figures = accuracy(model, batches, nb_classes, statistics, world, autocast)
        seconds = time.perf_counter() - began
        result = figures | {
            "images": source.samples_per_epoch,
            "images_per_s": round(source.samples_per_epoch / seconds, 2),
            "model": weights.model,
            "checkpoint": str(weights.path),
        }
        if config.output and world.main:
            path = Path(config.output).expanduser()
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as new:
                new.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        return result


def main(config: EvaluateConfig) -> int:
    """The command: `evaluate`, and its figures in a line; returns the exit status."""
    result = evaluate(config)
    if int(os.environ.get("RANK", "0")) == 0:
        print(
            f"accuracy {result['acc1']:.2f} % (best of 5: {result['acc5']:.2f} %), loss "
            f"{result['loss']:.4f} on {result['images']} pictures, "
            f"{result['images_per_s']:.1f} images/s"
        )
    return 0
