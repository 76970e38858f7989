"""Mean and standard deviation of each channel of a data set."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from convmae.data.errors import Failure, check_share
from convmae.data.normalisation import full_scale

if TYPE_CHECKING:
    from torch import Tensor

    from convmae.data.source import Source


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
        max_pictures: of more pictures, this many: an even sample, or of shards the first.
        workers: loading processes; the source's default if None.

    Returns:
        `(mean, std)`, a number a channel, in units of full scale: of uint8 255, of uint16 65535, of
        float32 1. The deviation divides by the number of pixels.

    Raises:
        ValueError: `max_pictures` is below 1.
        DataError: more pictures are unreadable than the source's `max_unreadable` allows.
    """
    if max_pictures is not None and max_pictures < 1:
        raise ValueError(f"max_pictures must be at least 1, got {max_pictures}")
    measured: dict[int, np.ndarray] = {}  # [3, C]: pixels, mean, squared deviations
    failures: list[Failure] = []
    for index, result in source.map(_moments, max_pictures, workers, measured=True):
        if isinstance(result, Failure):
            failures.append(result)
        else:
            measured[index] = result
    check_share(failures, len(measured) + len(failures), source.max_unreadable)
    moments = np.stack([measured[index] for index in sorted(measured)])
    pixels, means, squares = moments[:, 0], moments[:, 1], moments[:, 2]
    total = pixels.sum(0)
    mean = (pixels * means).sum(0) / total
    variance = (squares + pixels * (means - mean) ** 2).sum(0) / total
    scale = full_scale(source.dtype)
    return (mean / scale).tolist(), (np.sqrt(variance) / scale).tolist()


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
