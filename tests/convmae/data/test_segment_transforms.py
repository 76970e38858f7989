"""Training crops of pictures with label maps: picture and labels stay together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from convmae.data import UnreadableError, normalise
from convmae.data.segment_transforms import (
    SegmentEvalTransform,
    SegmentTransform,
    distorted,
    fitted_size,
)
from convmae.seeds import seeded

pytest.importorskip("torchvision")


class Labelled:
    """A picture whose pixels have the value `100 * class + 20`."""

    def __init__(self, classes: np.ndarray, channels: int = 3, dtype: Any = torch.uint8) -> None:
        self.classes, self.channels, self.dtype = torch.from_numpy(classes), channels, dtype

    def load(self) -> torch.Tensor:
        values = 100 * self.classes.int() + 20
        return values.expand(self.channels, -1, -1).to(self.dtype)

    def target(self) -> torch.Tensor:
        return self.classes


def halves(height: int = 40, width: int = 60) -> np.ndarray:
    """Class 1 on the right, 0 on the left."""
    return np.repeat((np.arange(width) >= width // 2)[None], height, 0).astype(np.uint8)


def test_sizes_are_those_of_mmcv() -> None:
    """`mmcv.rescale_size((w, h), (2048, 512))`: the short side 512, the long one 2048 at most."""
    assert fitted_size((480, 640), 512) == (512, 683)
    assert fitted_size((1000, 400), 512) == (1280, 512)
    assert fitted_size((100, 900), 512) == (228, 2048)
    assert fitted_size((3, 100), 8) == (1, 32)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_picture_and_labels_are_cut_and_flipped_alike(dtype: torch.dtype) -> None:
    picture = Labelled(halves(), 4, dtype)
    transform = SegmentTransform((32, 48), short=40, scale=(0.5, 2.0), fill=[1.0, 2.0, 3.0, 4.0])
    flips = set()
    for number in range(30):
        with seeded(number):
            image, labels = transform(picture)
        assert image.dtype == dtype and image.shape == (4, 32, 48)
        assert labels.dtype == torch.int64 and labels.shape == (32, 48)
        values = image.int()
        for number_of_class in (0, 1):
            inside = values[:, labels == number_of_class]
            assert inside.numel() == 0 or inside.float().mean() == pytest.approx(
                100 * number_of_class + 20, abs=15
            )
        padding = labels == 255
        for channel in range(4):
            assert (values[channel][padding] == channel + 1).all()
        known = labels[0][labels[0] != 255]
        flips.add(bool(known[0] > known[-1]))
        assert not padding[0, 0]  # padded at the right and at the bottom
    assert flips == {True, False}


def test_the_same_seed_gives_the_same_crop() -> None:
    picture, transform = Labelled(halves()), SegmentTransform((32, 32), short=40)
    crops = []
    for seed in (1, 1, 2):
        with seeded(seed):
            crops.append(transform(picture))
    assert all(torch.equal(a, b) for a, b in zip(crops[0], crops[1], strict=True))
    assert not torch.equal(crops[0][0], crops[2][0])


def test_crops_of_one_class_are_drawn_again() -> None:
    classes = np.zeros((40, 200), np.uint8)
    classes[:, 95:105] = 1
    mixed = {}
    for most in (0.9, 1.0):
        transform = SegmentTransform((40, 40), scale=(1, 1), most=most)
        found = 0
        for seed in range(60):
            with seeded(seed):
                found += int(transform(Labelled(classes))[1].max())
        mixed[most] = found / 60
    assert mixed[1.0] < 0.5 < 0.8 < mixed[0.9]


def test_padding_is_zero_when_it_is_normalised() -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.2, 0.2)
    transform = SegmentTransform((64, 64), scale=(1, 1), fill=[255 * m for m in mean])
    image, labels = transform(Labelled(halves()))
    padding = normalise(image[None], mean, std)[0][:, labels == 255]
    assert padding.numel() > 0
    assert padding.abs().max() <= 0.5 / 255 / 0.2 + 1e-6  # what rounding to whole numbers leaves


def test_colours_are_distorted_of_8_bit_pictures_of_3_channels_alone() -> None:
    classes = np.zeros((32, 32), np.uint8)
    classes[:, 16:] = 1
    for channels, dtype, changes in (
        (3, torch.uint8, True),
        (1, torch.uint8, False),
        (3, torch.uint16, False),
    ):
        transform = SegmentTransform((32, 32), scale=(1, 1), hflip=0.0)
        changed = 0
        for seed in range(20):
            with seeded(seed):
                image, _ = transform(Labelled(classes, channels, dtype))
            changed += not torch.equal(image, Labelled(classes, channels, dtype).load())
        assert (changed > 10) == changes and (changed == 0) == (not changes)


def test_distortion_changes_brightness_by_at_most_its_range() -> None:
    grey = torch.full((3, 4, 4), 100, dtype=torch.uint8)  # has no saturation and no hue
    values = []
    for seed in range(150):
        with seeded(seed):
            values.append(int(distorted(grey)[0, 0, 0]))
    assert min(values) >= (100 - 32) * 0.5 - 1 and max(values) <= (100 + 32) * 1.5 + 1
    assert min(values) < 60 and max(values) > 150 and values.count(100) > 15


def test_what_is_evaluated_is_whole_and_fillers_are_ignored() -> None:
    transform = SegmentEvalTransform((32, 32))
    image, labels = transform(Labelled(halves()))
    assert image.shape == (3, 40, 60) and labels.shape == (40, 60)
    assert (transform.target_of_filler((8, 9)) == 255).all()
    picture = Labelled(halves())
    picture.load = lambda: torch.zeros(3, 40, 59, dtype=torch.uint8)  # type: ignore[method-assign]
    with pytest.raises(UnreadableError, match="40 x 59 pixels, but its label map 40 x 60"):
        transform(picture)
