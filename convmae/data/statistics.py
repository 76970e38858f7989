"""Mean and standard deviation of each channel of a data set."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from convmae.data.errors import DataError, Failure, check_share
from convmae.data.normalisation import Statistics, full_scale

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from convmae.data.source import Source

CONSTANT = 1e-6  # times the mean: a smaller deviation is what rounding leaves of a constant
SMALLEST = 1e-30  # a smaller deviation cannot be divided by in float32


@dataclass(frozen=True)
class Measured:
    """Mean and deviation of a source, and of how many pictures.

    Attributes:
        statistics: a number a channel, in full scales.
        pictures: how many were measured.
        failures: which could not be read.
    """

    statistics: Statistics
    pictures: int
    failures: list[Failure]


def channel_statistics(
    source: Source, max_pictures: int | None = None, workers: int | None = None
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation over all pixels of all pictures, per channel, in full scales.

    Every picture counts as stored, uncropped, without the pixels that hold no data; the pixels of
    all are pooled, so that a larger picture weighs more. Computed in float64, a mean and a sum of
    squared deviations for each picture, then pooled in the order of the pictures: the same bits
    for any number of workers.

    Args:
        source: where the pictures come from.
        max_pictures: of more pictures, this many: the sample that `source.map` takes.
        workers: loading processes; the source's default if None.

    Returns:
        `(mean, std)`, a number a channel, in units of full scale: of uint8 255, of uint16 65535, of
        float32 1. The deviation divides by the number of pixels.

    Raises:
        ValueError: `max_pictures` is below 1.
        DataError: more pictures are unreadable than the source's `max_unreadable` allows.
    """
    mean, std = measure(source, max_pictures, workers).statistics
    return list(mean), list(std)


def measure(
    source: Source, max_pictures: int | None = None, workers: int | None = None
) -> Measured:
    """`channel_statistics`, and what they were measured on."""
    if max_pictures is not None and max_pictures < 1:
        raise ValueError(f"max_pictures must be at least 1, got {max_pictures}")
    measured: dict[int, np.ndarray] = {}  # [3, C]: pixels, mean, squared deviations
    failed: dict[int, Failure] = {}
    for index, result in source.map(_moments, max_pictures, workers, measured=True):
        if isinstance(result, Failure):
            failed[index] = result
        else:
            measured[index] = result
    failures = [failed[index] for index in sorted(failed)]
    check_share(failures, len(measured) + len(failures), source.max_unreadable)
    moments = np.stack([measured[index] for index in sorted(measured)])
    pixels, means, squares = moments[:, 0], moments[:, 1], moments[:, 2]
    total = pixels.sum(0)
    mean = (pixels * means).sum(0) / total
    variance = (squares + pixels * (means - mean) ** 2).sum(0) / total
    scale = full_scale(source.dtype)
    statistics = Statistics(
        tuple((mean / scale).tolist()), tuple((np.sqrt(variance) / scale).tolist())
    )
    return Measured(statistics, len(measured), failures)


def check_deviations(measured: Measured, data: str) -> None:
    """Raises `DataError` where a channel is the same everywhere, and so cannot be normalised.

    Args:
        measured: what was measured.
        data: how to call the pictures.
    """
    mean, std = measured.statistics
    wrong = [
        channel
        for channel, (centre, spread) in enumerate(zip(mean, std))
        if not math.isfinite(centre)
        or not math.isfinite(spread)
        or spread <= max(SMALLEST, CONSTANT * abs(centre))
    ]
    if wrong:
        named = ", ".join(f"{c + 1} (mean {mean[c]:.6g}, deviation {std[c]:.6g})" for c in wrong)
        plural = "s" if len(wrong) > 1 else ""
        raise DataError(
            f"channel{plural} {named} of {len(mean)} of {data} cannot be normalised "
            f"(counted from 1): the same everywhere in {measured.pictures:,} pictures, or not "
            "finite. Leave it out by --bands, or give the --mean and --std of all channels"
        )


def far_apart(used: Statistics, measured: Statistics) -> list[int]:
    """The channels that `used` was not made for.

    The measured mean is more than two deviations from the mean used, or the deviation more than
    ten times another.
    """
    return [
        channel
        for channel, (centre, spread, mean, std) in enumerate(zip(*used, *measured))
        if not (abs(mean - centre) <= 2 * spread and std / 10 <= spread <= std * 10)
    ]


def in_words(values: Sequence[float]) -> str:
    """Four digits each."""
    return " ".join(f"{value:.4g}" for value in values)


def _moments(image: Tensor) -> np.ndarray:
    """`[C, h, w]` -> `[3, C]` float64: pixels but NaN, their mean, their squared deviations."""
    values = image.numpy().reshape(len(image), -1).astype(np.float64)
    if np.isnan(values).any():
        return np.concatenate([_of_known(band[~np.isnan(band)][None]) for band in values], 1)
    return _of_known(values)


def _of_known(values: np.ndarray) -> np.ndarray:
    mean = values.mean(1)
    squares = ((values - mean[:, None]) ** 2).sum(1)
    return np.stack([np.full(len(values), float(values.shape[1])), mean, squares])
