"""Accuracy of a classifier on batches with labels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from convmae.config import OptionError
from convmae.data import DataError, normalise

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from convmae.data import Batch, Failure, Source, Statistics
    from convmae.training.distributed import World


@torch.no_grad()
def accuracy(
    model: nn.Module,
    batches: Iterable[Batch],
    nb_classes: int,
    statistics: Statistics,
    world: World,
    autocast: torch.autocast,
    failures: list[Failure] | None = None,
) -> dict[str, float]:
    """`acc1`, `acc5` (per cent; the second where there are more than 5 classes), mean `loss`.

    Fillers, whose label is -1, count for nothing. Every process gets the figures of all; where
    pictures could not be read, `unreadable` says how many.

    Args:
        model, batches, nb_classes, statistics, world, autocast: what is evaluated, and how.
        failures: the pictures that this process could not read are added here.

    Raises:
        DataError: a label is not below `nb_classes`, or there is no picture.
    """
    from torchmetrics import MeanMetric, MetricCollection
    from torchmetrics.classification import MulticlassAccuracy

    common: dict[str, Any] = {"average": "micro", "ignore_index": -1}
    metrics = MetricCollection(
        {
            f"acc{best}": MulticlassAccuracy(nb_classes, top_k=best, **common)
            for best in ((1, 5) if nb_classes > 5 else (1,))
        },
        compute_groups=False,
    ).to(world.device)
    losses = MeanMetric().to(world.device)
    failures = [] if failures is None else failures
    before = len(failures)
    was_training = model.training
    model.eval()
    for batch in batches:
        failures += batch.failures
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
    unreadable = round(world.mean(float(len(failures) - before))[0] * world.size)
    if unreadable:
        figures["unreadable"] = unreadable
    return figures


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
