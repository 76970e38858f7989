"""Accuracy of a classifier on a split of a data set, and `convmae evaluate`."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import convmae
from convmae.data import DataError, EvalTransform, normalise, open_source
from convmae.training.checkpoint import load_model, read_weights, replacing
from convmae.training.config import OptionError
from convmae.training.distributed import join
from convmae.training.machine import pick_dtype

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from convmae.data import Batch, Source
    from convmae.training.config import EvaluateConfig
    from convmae.training.distributed import World

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def check_labels(source: Source, nb_classes: int, option: str) -> None:
    """Raises `OptionError` unless the pictures have labels, and no more classes than the model."""
    if source.classes is None:
        raise OptionError(
            f"{option} holds pictures without labels; expected class folders, IDX files with "
            "labels, or shards with .cls members"
        )
    if len(source.classes) > nb_classes:
        raise OptionError(
            f"--nb_classes {nb_classes} is fewer than the {len(source.classes)} classes of {option}"
        )


@torch.no_grad()
def accuracy(
    model: nn.Module,
    batches: Iterable[Batch],
    nb_classes: int,
    statistics: Statistics,
    world: World,
    autocast: torch.autocast,
) -> dict[str, float]:
    """`acc1`, `acc5` (per cent; the second of the best 5, or of all classes if fewer), mean `loss`.

    Fillers, whose label is -1, count for nothing. Every process gets the figures of all.

    Raises:
        DataError: a label is not below `nb_classes`, or there is no picture.
    """
    from torchmetrics import MeanMetric, MetricCollection
    from torchmetrics.classification import MulticlassAccuracy

    common: dict[str, Any] = {"average": "micro", "ignore_index": -1}
    metrics = MetricCollection(
        {
            "acc1": MulticlassAccuracy(nb_classes, top_k=1, **common),
            "acc5": MulticlassAccuracy(nb_classes, top_k=min(5, nb_classes), **common),
        },
        compute_groups=False,
    ).to(world.device)
    losses = MeanMetric().to(world.device)
    was_training = model.training
    model.eval()
    for batch in batches:
        labels = batch.labels.to(world.device)
        if int(labels.max()) >= nb_classes:
            raise DataError(
                f"a picture has label {int(labels.max())}, but the model has {nb_classes} classes "
                f"(0 to {nb_classes - 1})"
            )
        images = normalise(batch.images.to(world.device), *statistics)
        with autocast:
            logits = model(images).float()
        metrics.update(logits, labels)
        real = labels >= 0
        if bool(real.any()):
            each = torch.nn.functional.cross_entropy(logits[real], labels[real], reduction="none")
            losses.update(each)
    model.train(was_training)
    figures = {name: 100 * float(value) for name, value in metrics.compute().items()}
    figures["loss"] = float(losses.compute())
    return figures


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
        model: Any = load_model(config.checkpoint, world.device)
        weights = read_weights(config.checkpoint, "--checkpoint")
        if not isinstance(model, convmae.ConvViT):
            raise OptionError(
                f"--checkpoint {config.checkpoint!r} is a {type(model).__name__}, which does not "
                "classify; expected what convmae finetune or linprobe wrote"
            )
        nb_classes = int(model.config["num_classes"])
        source = open_source(
            config.data_path, split=config.split, max_unreadable=config.max_unreadable
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
        figures = accuracy(model, batches, nb_classes, weights.statistics, world, autocast)
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


def check_channels(source: Source, model: Any, data_path: str) -> None:
    """Raises `OptionError` unless the pictures have the model's channels."""
    if source.channels != model.in_chans:
        raise OptionError(
            f"--data_path {data_path!r} has pictures of {source.channels} channels, but the model "
            f"takes {model.in_chans}"
        )


def better(figures: dict[str, float], best: float | None) -> bool:
    """Whether `acc1` is a number above the best so far."""
    return math.isfinite(figures["acc1"]) and (best is None or figures["acc1"] > best)
