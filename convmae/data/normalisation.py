"""Stored pixel values to what a network takes, on the device, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Statistics(NamedTuple):
    """What pictures are normalised with: a number a channel, in units of full scale."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET = Statistics(IMAGENET_MEAN, IMAGENET_STD)
FULL_SCALE = {torch.uint8: 255.0, torch.uint16: 65535.0, torch.float32: 1.0}


def full_scale(dtype: torch.dtype) -> float:
    """The value of white: 255 of uint8, 65535 of uint16, 1 of float32.

    Raises:
        ValueError: pictures have no such dtype.
    """
    if dtype not in FULL_SCALE:
        raise ValueError(f"images must be uint8, uint16 or float32, got {dtype}")
    return FULL_SCALE[dtype]


def normalise(
    images: Tensor,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Tensor:
    """`(images / full_scale - mean) / std`, `[N, C, H, W]` -> float32 on the same device.

    Args:
        images: uint8, uint16 or float32, as stored.
        mean, std: one number a channel, in units of full scale; ImageNet's by default.

    Raises:
        ValueError: another dtype, not one number a channel, or a deviation of 0.
    """
    scale = full_scale(images.dtype)
    centre, spread = _columns(images, mean, std)
    return images.to(torch.float32, copy=True).div_(scale).sub_(centre).div_(spread)


def denormalise(
    images: Tensor,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Tensor:
    """`images * std + mean`, clamped to [0, 1]: the inverse of `normalise`, but for full scale.

    Raises:
        ValueError: not one number a channel, or a deviation of 0.
    """
    centre, spread = _columns(images, mean, std)
    return images.float().mul(spread).add_(centre).clamp_(0, 1)


def _columns(images: Tensor, *statistics: Sequence[float]) -> list[Tensor]:
    for name, values in zip(("mean", "std"), statistics):
        if len(values) != images.shape[-3]:
            raise ValueError(
                f"{name} must have one number a channel, got {len(values)} for images of shape "
                f"{list(images.shape)}"
            )
    if min(statistics[1]) <= 0:
        raise ValueError(f"std must be above 0, got {list(statistics[1])}")
    return [torch.tensor(tuple(v), device=images.device).view(-1, 1, 1) for v in statistics]
