"""Transforms, normalisation and the statistics of a data set."""

from __future__ import annotations

import pickle
import random
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from convmae.config import ReadOptions
from convmae.data import (
    DataError,
    EvalTransform,
    FinetuneTransform,
    LinprobeTransform,
    Pixels,
    PretrainTransform,
    channel_statistics,
    denormalise,
    full_scale,
    normalise,
    open_source,
)
from convmae.data.crops import single_draw_box
from convmae.seeds import seeded
from tests.support.paths import FASHION

if TYPE_CHECKING:
    from pathlib import Path

Image = pytest.importorskip("PIL.Image")
transforms = pytest.importorskip("torchvision.transforms.v2")
HWC = ReadOptions(layout="hwc")


def photograph(channels: int = 3, dtype: torch.dtype = torch.uint8) -> Pixels:
    """A smooth random picture `[channels, 60, 80]`."""
    coarse = torch.rand(1, channels, 5, 6, generator=torch.Generator().manual_seed(0))
    fine = torch.nn.functional.interpolate(coarse, (60, 80), mode="bilinear")[0]
    scale = full_scale(dtype)
    return Pixels((fine * scale).to(dtype))


KINDS = [(1, torch.uint8), (4, torch.uint16), (12, torch.float32), (3, torch.uint8)]
TRANSFORMS = [
    PretrainTransform((32, 48)),
    LinprobeTransform((32, 48)),
    EvalTransform((32, 48)),
    FinetuneTransform((32, 48), aa=None),
]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize(("channels", "dtype"), KINDS)
def test_every_kind_of_picture(transform, channels: int, dtype: torch.dtype) -> None:
    copy = pickle.loads(pickle.dumps(transform))
    picture = photograph(channels, dtype)
    with seeded(4):
        image = transform(picture)
    with seeded(4):
        assert torch.equal(copy(picture), image)
    assert image.shape == (channels, 32, 48) and image.dtype == dtype
    assert image.float().std() > 0.05 * full_scale(dtype)


# -- fine-tuning ----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("aa", ["rand-m9-mstd0.5-inc1", "original-mstd0.5", "v0", "3a"])
def test_augmentation_depends_on_the_seed_alone(channels: int, aa: str) -> None:
    pytest.importorskip("timm")
    transform = pickle.loads(pickle.dumps(FinetuneTransform((32, 32), aa=aa)))
    plain = FinetuneTransform((32, 32), aa="none")
    picture = photograph(channels)
    changed = 0
    for seed in range(12):
        images = []
        for noise in (1, 2):
            random.seed(noise)
            np.random.seed(noise)
            with seeded(seed):
                images.append(transform(picture))
        with seeded(seed):
            unchanged = plain(picture)
        assert images[0].shape == (channels, 32, 32) and images[0].dtype == torch.uint8
        assert torch.equal(*images)
        changed += not torch.equal(images[0], unchanged)
    assert changed >= 6


def test_augmentation_is_timms() -> None:
    """The policy, applied to the same crop with the same random numbers."""
    timm = pytest.importorskip("timm.data")
    theirs = timm.create_transform(
        (3, 64, 64), is_training=True, auto_augment="rand-m9-mstd0.5-inc1", separate=True
    )[1].transforms[0]
    # timm picks the interpolation of each operation at random, as ours does
    picture = Pixels(photograph().image[:, :60, :60])
    ours = FinetuneTransform((64, 64), min_crop=1.0, hflip=0.0)
    ours.pick = lambda height, width: (0, 0, height, width)
    whole = picture.crop(ours.pick, (64, 64))
    for seed in range(8):
        with seeded(seed):
            torch.rand(())
            wanted = theirs(Image.fromarray(whole.permute(1, 2, 0).contiguous().numpy()))
        with seeded(seed):
            got = ours(picture)
        assert np.array_equal(got.permute(1, 2, 0).numpy(), np.asarray(wanted))


@pytest.mark.parametrize("channels", [1, 3])
def test_posterizing_to_no_bits_is_black(channels: int) -> None:
    """What RandAugment's strongest step asks for, and Pillow 13 refuses."""
    pytest.importorskip("timm")
    transform = FinetuneTransform((32, 32), aa="rand-m10-mstd0-inc1-n1-p1")
    augment = transform._augment[channels]
    augment.ops = [op for op in augment.ops if op.name == "PosterizeIncreasing"]
    assert len(augment.ops) == 1
    assert not transform(photograph(channels)).any()
    augment.ops[0].magnitude = 5  # of 10: keeps 2 bits
    image = transform(photograph(channels))
    assert set(image.unique().tolist()) == {0, 64, 128, 192}


def test_color_jitter_is_only_without_a_policy() -> None:
    pytest.importorskip("timm")
    picture = photograph()
    with seeded(0):
        plain = FinetuneTransform((32, 32), aa=None)(picture)
    with seeded(0):
        jittered = FinetuneTransform((32, 32), aa=None, color_jitter=0.4)(picture)
    assert not torch.equal(plain, jittered)
    for strength in (None, 0.4):
        assert FinetuneTransform((32, 32), color_jitter=strength).color_jitter is None


def test_augmentation_of_other_pictures_is_refused() -> None:
    pytest.importorskip("timm")
    transform = FinetuneTransform((32, 32))
    for channels, dtype in KINDS[1:3]:
        match = f"aa 'rand-m9-mstd0.5-inc1' needs 8-bit .* are .* of {channels}; give aa none"
        with pytest.raises(DataError, match=match):
            transform(photograph(channels, dtype))
    with pytest.raises(DataError, match="color_jitter needs 8-bit pictures"):
        FinetuneTransform((32, 32), aa="none", color_jitter=0.4).check(4, torch.uint8)
    transform.check(1, torch.uint8)
    for wrong in ("rand-x9", "random", "best"):
        with pytest.raises(DataError, match=f"aa '{wrong}' is no policy of timm"):
            FinetuneTransform((32, 32), aa=wrong)


def test_a_source_checks_its_transform(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    np.save(tmp_path / "a.npy", np.zeros((8, 8, 5), dtype=np.uint8))
    with pytest.raises(DataError, match="aa .* uint8 of 5"):
        open_source(tmp_path, reading=HWC).batches(FinetuneTransform((32, 32)), 1, 0, 1)


# -- linear probing and evaluation ----------------------------------------------------------------


def test_boxes_of_one_draw() -> None:
    """Of a wide picture many boxes do not fit: their height is cut off, nothing is drawn again."""
    areas, ratios, full = [], [], 0
    with seeded(0):
        for _ in range(400):
            top, left, height, width = single_draw_box(30, 300)
            assert top >= 0 <= left and top + height <= 30 and left + width <= 300
            full += height == 30
        for _ in range(400):
            _, _, height, width = single_draw_box(4000, 4000)
            if max(height, width) < 4000:
                areas.append(height * width / 16e6)
                ratios.append(width / height)
    assert full > 300
    assert 0.08 <= min(areas) < 0.12 and max(areas) > 0.85
    assert min(ratios) + 1e-3 >= 0.75 and max(ratios) <= 4 / 3 + 1e-3
    assert abs(float(np.mean(np.log(ratios)))) < 0.05


@pytest.mark.parametrize("shape", [(60, 80), (80, 60), (50, 50), (301, 40)])
def test_evaluation_is_torchvisions_resize_and_centre_crop(shape: tuple[int, int]) -> None:
    image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    bicubic = transforms.InterpolationMode.BICUBIC
    for size, pct in ((224, 0.875), (32, 1.0), (48, 0.9)):
        theirs = transforms.Compose(
            [transforms.Resize(round(size / pct), bicubic), transforms.CenterCrop(size)]
        )
        got = EvalTransform((size, size), pct)(Pixels(image))
        assert torch.equal(got, theirs(image))
    assert round(224 / 0.875) == 256


def test_evaluation_of_rectangles_keeps_the_aspect_ratio() -> None:
    ramp = torch.linspace(0, 1, 400).expand(1, 100, 400)  # brightness tells the column
    image = EvalTransform((64, 128), 0.8)(Pixels(ramp))[0]
    assert image.shape == (64, 128)
    # resized to 80 x 320, so that a pixel is 1.25 of the picture's columns
    assert float(image[0, -1] - image[0, 0]) == pytest.approx(127 * 1.25 / 399, rel=0.02)
    assert float(image.mean()) == pytest.approx(0.5, abs=0.01)
    with pytest.raises(ValueError, match="crop_pct must be above 0 and at most 1, got 1.1"):
        EvalTransform((32, 32), 1.1)


# -- normalisation --------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "dtype"), KINDS)
def test_normalise_in_full_scales(channels: int, dtype: torch.dtype) -> None:
    images = photograph(channels, dtype).load()[None]
    mean = [0.1 + 0.01 * c for c in range(channels)]
    std = [0.2 + 0.01 * c for c in range(channels)]
    before = images.clone()
    got = normalise(images, mean, std)
    scale = {torch.uint8: 255, torch.uint16: 65535, torch.float32: 1}[dtype]
    column = [torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (mean, std)]
    wanted = (images.double() / scale - column[0]) / column[1]
    torch.testing.assert_close(got.double(), wanted, atol=2e-6, rtol=0)
    assert got.dtype == torch.float32 and torch.equal(images, before)
    back = denormalise(got, mean, std)
    torch.testing.assert_close(back.double(), images.double() / scale, atol=1e-6, rtol=0)


def test_statistics_must_fit_the_channels() -> None:
    images = torch.zeros(1, 4, 2, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"mean must have one number a channel, got 3 .*\[1, 4,"):
        normalise(images)
    with pytest.raises(ValueError, match="std must have one number a channel, got 1"):
        denormalise(images.float(), [0.0] * 4, [1.0])
    with pytest.raises(ValueError, match="must be uint8, uint16 or float32, got torch.int64"):
        normalise(images.long(), [0.0] * 4, [1.0] * 4)
    with pytest.raises(ValueError, match=r"std must be above 0, got \[1.0, 0.0, 1.0, 1.0\]"):
        normalise(images, [0.0] * 4, [1.0, 0.0, 1.0, 1.0])


# -- statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_statistics_pool_the_pixels_of_all_pictures(tmp_path: Path, dtype) -> None:
    rng = np.random.default_rng(0)
    scale = full_scale(getattr(torch, dtype.__name__))
    arrays = []
    for index, (height, width) in enumerate([(8, 8), (20, 30), (40, 9), (8, 50)]):
        values = rng.random((height, width, 5)) * (index + 1) / 4
        arrays.append((values * scale).astype(dtype))
        np.save(tmp_path / f"{index}.npy", arrays[-1])
    pixels = np.concatenate([array.reshape(-1, 5) for array in arrays]).astype(np.float64) / scale
    source = open_source(tmp_path, reading=HWC)
    mean, std = channel_statistics(source, workers=0)
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std(0), rtol=1e-12)
    assert channel_statistics(source, workers=2) == (mean, std)
    part, _ = channel_statistics(source, max_pictures=2, workers=0)  # pictures 0 and 2
    chosen = np.concatenate([arrays[i].reshape(-1, 5) for i in (0, 2)]).astype(np.float64)
    np.testing.assert_allclose(part, chosen.mean(0) / scale, rtol=1e-12)


def test_statistics_of_fashion_mnist() -> None:
    source = open_source(FASHION)
    (mean,), (std,) = channel_statistics(source, workers=0)
    values = source.photos.images.astype(np.float64) / 255
    assert (mean, std) == pytest.approx((values.mean(), values.std()), rel=1e-12)
    assert (mean, std) == pytest.approx((0.2860, 0.3530), abs=0.01)  # of all 60 000


def test_statistics_leave_out_few_broken_pictures_and_refuse_many(tmp_path: Path) -> None:
    for index in range(4):
        Image.new("RGB", (8, 8), (51 * index, 0, 255)).save(tmp_path / f"{index}.png")
    (tmp_path / "3.png").write_text("broken")
    source = open_source(tmp_path, max_unreadable=0.25)
    mean, std = channel_statistics(source, workers=0)
    assert mean == pytest.approx([0.2, 0, 1]) and std[1:] == [0, 0]
    source.max_unreadable = 0.1
    with pytest.raises(DataError, match="1 of 4 pictures cannot be read"):
        channel_statistics(source, workers=0)
    with pytest.raises(ValueError, match="max_pictures must be at least 1, got 0"):
        channel_statistics(source, 0)
