"""Random-resized-crops that depend on (seed, epoch, sample) alone, whoever computes them."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from convmae.data.picture import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MIN_CROP = 0.2  # share of the picture's area, as the official recipe
CROP_RATIO = (3 / 4, 4 / 3)

Box = tuple[int, int, int, int]  # top, left, height, width
Failure = tuple[int, str]  # index of the picture, why it could not be read


class UnreadableError(Exception):
    """One picture could not be decoded; the message says why."""


class Photos(Protocol):
    """Pictures that can be cropped by index."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call picture `index` in messages."""

    def crop(self, index: int, pick: Callable[[int, int], Box], size: tuple[int, int]) -> Tensor:
        """`resize(picture[pick(height, width)], size)`, uint8 `[3, H, W]`, bicubic, antialiased.

        Raises:
            UnreadableError: the picture cannot be decoded.
        """


def derive_seed(*keys: int) -> int:
    """A 63-bit seed from non-negative integers; different keys give unrelated streams."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> 1)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Runs its body on torch's CPU generator seeded with `seed`, and puts the old state back."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def random_box(height: int, width: int, min_crop: float = MIN_CROP) -> Box:
    """torchvision's `RandomResizedCrop.get_params`: from `min_crop` of the area on, 3:4 to 4:3."""
    from torchvision.transforms import RandomResizedCrop

    shape_only = torch.empty(3, height, width, device="meta")
    scale, ratio = [min_crop, 1.0], list(CROP_RATIO)
    top, left, h, w = RandomResizedCrop.get_params(shape_only, scale, ratio)
    return top, left, h, w


def centre_box(size: tuple[int, int]) -> Callable[[int, int], Box]:
    """Picks the largest centred box of the aspect ratio of `size`, `(H, W)`."""

    def pick(height: int, width: int) -> Box:
        scale = min(height / size[0], width / size[1])
        h, w = max(1, int(size[0] * scale)), max(1, int(size[1] * scale))
        return (height - h) // 2, (width - w) // 2, h, w

    return pick


def resized_crop(image: Tensor, box: Box, size: tuple[int, int]) -> Tensor:
    """`resize(image[box], size)`, uint8 `[3, h, w]` -> `[3, H, W]`, bicubic, antialiased."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import resized_crop

    bicubic = InterpolationMode.BICUBIC
    return resized_crop(image, *box, size=list(size), interpolation=bicubic, antialias=True)


def normalise(images: Tensor) -> Tensor:
    """`(images / 255 - mean) / std` with ImageNet's statistics, uint8 `[N, 3, H, W]` -> float32."""
    mean, std = _statistics(images)
    return images.float().div_(255).sub_(mean).div_(std)


def denormalise(images: Tensor) -> Tensor:
    """`images * std + mean`, clamped to [0, 1]: the inverse of `normalise`, but for the 255."""
    mean, std = _statistics(images)
    return images.float().mul(std).add_(mean).clamp_(0, 1)


def _statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    as_column = [
        torch.tensor(values, device=images.device).view(3, 1, 1)
        for values in (IMAGENET_MEAN, IMAGENET_STD)
    ]
    return as_column[0], as_column[1]


class CropDataset(Dataset[tuple[Tensor, list[Failure]]]):
    """Random-resized-crop and horizontal flip of sample `i` of epoch `e`: `dataset[e, i]`.

    Sample `i` comes from picture `i % len(photos)`. A picture that cannot be decoded is replaced by
    the next one that can (so the replacement is the same in every run), and reported.

    Args:
        photos: where the pictures come from.
        size: `(H, W)` of the crops in pixels.
        seed: with the epoch and the sample, all that the crop depends on.
        samples_per_epoch: how many crops make an epoch; one of each picture if None.
        min_crop: smallest share of a picture's area that a crop takes, in `(0, 1]`.
        hflip: share of the crops that is flipped left to right, in `[0, 1]`.
    """

    def __init__(
        self,
        photos: Photos,
        size: tuple[int, int],
        seed: int = 0,
        samples_per_epoch: int | None = None,
        min_crop: float = MIN_CROP,
        hflip: float = 0.5,
    ) -> None:
        self.photos = photos
        self.size = size
        self.seed = seed
        self.samples_per_epoch = samples_per_epoch or len(photos)
        self.hflip = hflip
        self.pick = partial(random_box, min_crop=min_crop)

    def __len__(self) -> int:
        return self.samples_per_epoch

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, list[Failure]]:
        """uint8 `[3, H, W]`, and the pictures that could not be read on the way.

        Raises:
            DataError: no picture at all could be read.
        """
        from torchvision.transforms.v2.functional import horizontal_flip

        epoch, sample = key
        with seeded(derive_seed(self.seed, epoch, sample)):
            flip = bool(torch.rand(()) < self.hflip)
            image, failures = read_or_next(self.photos, sample, self.pick, self.size)
        return (horizontal_flip(image) if flip else image), failures


def read_or_next(
    photos: Photos, index: int, pick: Callable[[int, int], Box], size: tuple[int, int]
) -> tuple[Tensor, list[Failure]]:
    """The crop of picture `index`, or of the first readable one after it; and who failed.

    Raises:
        DataError: not one of the pictures can be read.
    """
    failures: list[Failure] = []
    for step in range(len(photos)):
        candidate = (index + step) % len(photos)
        try:
            return photos.crop(candidate, pick, size), failures
        except UnreadableError as error:
            failures.append((candidate, str(error)))
    name, reason = (photos.name(failures[0][0]), failures[0][1]) if failures else ("none", "")
    raise DataError(f"none of the {len(photos)} pictures can be read; the first, {name}: {reason}")
