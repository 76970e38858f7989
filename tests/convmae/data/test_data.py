"""Pictures, crops and batches: every format, broken files, and independence of who loads what."""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from convmae.data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    DataError,
    DemoPhotos,
    EvalTransform,
    FolderPhotos,
    PretrainTransform,
    check_readable,
    denormalise,
    find_pictures,
    normalise,
    read_picture,
)
from convmae.data.crops import centre_box, random_box
from convmae.data.formats.pillow import decoded, to_rgb, upright_size
from convmae.data.loader import PictureDataset, RunSampler
from convmae.data.source import PhotoSource
from convmae.seeds import seeded
from tests.support.paths import ROOT

if TYPE_CHECKING:
    from pathlib import Path

    from convmae.data import Failure, Photos

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("torchvision")


def gradient(height: int, width: int) -> np.ndarray:
    """A smooth picture, uint8 `[height, width, 3]`: red grows down, green grows to the right."""
    red = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    green = np.linspace(0, 255, width)[None].repeat(height, 0)
    return np.stack([red, green, np.full((height, width), 90.0)], 2).round().astype(np.uint8)


def write(path: Path, height: int = 40, width: int = 60) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(gradient(height, width)).save(path)
    return path


class Crops:
    """Crops of `photos` by `[epoch, sample]`."""

    def __init__(self, photos: Photos, size: tuple[int, int], seed: int = 0, **options) -> None:
        self.data = PictureDataset(photos, PretrainTransform(size, **options), seed)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, list[Failure]]:
        sample, failures = self.data.sample(*key)
        return sample.image, failures


def picked(photos: FolderPhotos | DemoPhotos, index: int, size: tuple[int, int]) -> torch.Tensor:
    return photos.crop(index, centre_box(size), size)


# -- finding files --------------------------------------------------------------------------------


def test_flat_and_nested_folders_are_read_in_a_fixed_order(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "deep/er/c.webp", "deep/d.tif", "z/e.bmp"):
        write(tmp_path / name)
    write(tmp_path / ".hidden" / "no.png")
    write(tmp_path / "._mac.png")
    (tmp_path / "notes.txt").write_text("no picture")
    found = [path.relative_to(tmp_path).as_posix() for path in find_pictures(tmp_path)]
    assert found == ["a.JPG", "b.png", "deep/d.tif", "deep/er/c.webp", "z/e.bmp"]


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path / "real" / "a.png")
    (tmp_path / "real" / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert len(find_pictures(tmp_path)) == 1


def test_missing_empty_and_non_folders_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data_path .*nowhere.* does not exist; expected 'demo'"):
        find_pictures(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"is a file, not a folder"):
        find_pictures(write(tmp_path / "files" / "a.png"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no picture \(looked for: avif bmp"):
        find_pictures(tmp_path / "empty")


# -- reading files --------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", ["png", "bmp", "tif", "webp", "ppm", "tga", "gif", "jp2"])
def test_every_format_gives_the_same_colours(tmp_path: Path, extension: str) -> None:
    image = Image.fromarray(gradient(32, 48))
    options = {"lossless": True} if extension == "webp" else {}
    image.save(tmp_path / f"a.{extension}", **options)
    got = np.array(read_picture(tmp_path / f"a.{extension}"), dtype=int)
    limit = 40 if extension == "gif" else 0  # a palette of 256 colours
    assert got.shape == (32, 48, 3)
    assert np.abs(got - gradient(32, 48)).max() <= limit


def test_modes_convert_to_rgb(tmp_path: Path) -> None:
    rgb = Image.fromarray(gradient(32, 48))
    grey = np.asarray(rgb.convert("L"))
    for mode in ("L", "1", "CMYK", "YCbCr", "P", "RGBA", "LA", "HSV"):
        converted = to_rgb(rgb.convert(mode))
        assert converted.mode == "RGB"
        expected = np.asarray(rgb.convert(mode).convert("RGB"), dtype=int)
        assert np.abs(np.asarray(converted, dtype=int) - expected).max() <= 1, mode
    assert np.array_equal(np.asarray(to_rgb(Image.fromarray(grey)))[..., 1], grey)


def test_more_than_eight_bits_do_not_become_rgb() -> None:
    for values in (np.zeros((4, 4), dtype=np.uint16), np.zeros((4, 4), dtype=np.float32)):
        with pytest.raises(ValueError, match="has more than 8 bits a channel"):
            to_rgb(Image.fromarray(values))


def test_transparent_pixels_are_white(tmp_path: Path) -> None:
    values = np.zeros((8, 8, 4), dtype=np.uint8)
    values[:4] = (200, 10, 20, 255)
    Image.fromarray(values).save(tmp_path / "a.png")
    got = np.asarray(read_picture(tmp_path / "a.png"))
    assert (got[:4] == (200, 10, 20)).all()
    assert (got[4:] == 255).all()
    palette = Image.new("P", (4, 4), 0)
    palette.info["transparency"] = 0
    assert (np.asarray(to_rgb(palette)) == 255).all()


def test_exif_orientation_is_obeyed(tmp_path: Path) -> None:
    image = Image.fromarray(gradient(32, 48))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as header:
        assert upright_size(header) == (48, 32)
    got = np.asarray(read_picture(tmp_path / "a.png"))
    assert np.array_equal(got, np.rot90(gradient(32, 48), k=-1))


def test_a_large_jpeg_is_decoded_small_and_the_crop_is_the_same(tmp_path: Path) -> None:
    Image.fromarray(gradient(640, 960)).save(tmp_path / "a.jpg", quality=95)
    Image.fromarray(gradient(640, 960)).save(tmp_path / "a.png")
    for shrink, size in ((8, (120, 80)), (3.9, (480, 320))):
        with Image.open(tmp_path / "a.jpg") as image:
            assert decoded(image, shrink).size == size
    photos = FolderPhotos([tmp_path / "a.jpg", tmp_path / "a.png"])
    boxes = [lambda h, w: (0, 0, h, w), lambda h, w: (301, 422, 177, 259)]
    for pick in boxes:
        small, exact = (photos.crop(i, pick, (32, 48)).int() for i in (0, 1))
        assert (small - exact).abs().max() <= 4


# -- unreadable files -----------------------------------------------------------------------------


def broken_folder(tmp_path: Path) -> list[Path]:
    """Six files, of which 1 (empty), 2 (text) and 4 (cut short) cannot be read."""
    for index in range(6):
        write(tmp_path / f"{index}.png", 64, 64)
    (tmp_path / "1.png").write_bytes(b"")
    (tmp_path / "2.png").write_text("hello")
    data = (tmp_path / "4.png").read_bytes()
    (tmp_path / "4.png").write_bytes(data[: len(data) // 2])
    return find_pictures(tmp_path)


def test_the_check_names_every_broken_file(tmp_path: Path) -> None:
    failures, checked = check_readable(broken_folder(tmp_path))
    assert checked == 6
    reasons = dict(failures)
    assert set(reasons) == {str(tmp_path / f"{index}.png") for index in (1, 2, 4)}
    assert reasons[str(tmp_path / "1.png")] == "the file is empty"
    assert reasons[str(tmp_path / "2.png")] == "not a picture that Pillow knows"
    assert all(reason and str(tmp_path) not in reason for reason in reasons.values())


def test_a_broken_picture_is_replaced_by_the_next(tmp_path: Path) -> None:
    photos = FolderPhotos(broken_folder(tmp_path))
    data = Crops(photos, (32, 32), seed=1)
    image, failures = data[0, 1]
    assert [failure.name for failure in failures] == [photos.name(1), photos.name(2)]
    again, _ = data[0, 1]
    assert torch.equal(image, again)
    assert data[0, 3][1] == []


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    for index in range(3):
        (tmp_path / f"{index}.png").write_text("no")
    data = Crops(FolderPhotos(find_pictures(tmp_path)), (32, 32))
    with pytest.raises(DataError, match="none of the 3 pictures can be read; the first, .*0.png"):
        data[0, 0]


# -- crops ----------------------------------------------------------------------------------------


def test_the_demo_photographs_are_there() -> None:
    photos = DemoPhotos()
    assert len(photos) == 8
    for index in range(len(photos)):
        crop = picked(photos, index, (48, 64))
        assert crop.shape == (3, 48, 64)
        assert crop.dtype == torch.uint8
        assert crop.float().std() > 10, photos.name(index)


def test_a_crop_depends_on_seed_epoch_and_sample_alone() -> None:
    first, second = (Crops(DemoPhotos(), (32, 48), seed=3) for _ in range(2))
    torch.manual_seed(0)
    wanted = first[2, 11][0]
    first[0, 0], first[7, 1]
    torch.manual_seed(99)
    assert torch.equal(second[2, 11][0], wanted)
    assert wanted.shape == (3, 32, 48)
    for other in (first[3, 11], first[2, 19], Crops(DemoPhotos(), (32, 48), seed=4)[2, 11]):
        assert not torch.equal(other[0], wanted)


def test_cropping_leaves_the_global_generator_alone() -> None:
    data = Crops(DemoPhotos(), (32, 32))
    state = torch.get_rng_state()
    data[0, 0]
    assert torch.equal(torch.get_rng_state(), state)


def test_random_boxes_follow_the_recipe() -> None:
    areas, ratios = [], []
    with seeded(0):
        for _ in range(300):
            top, left, height, width = random_box(300, 400)
            assert top >= 0 <= left and top + height <= 300 and left + width <= 400
            areas.append(height * width / 120_000)
            ratios.append(width / height)
        large = [random_box(300, 400, min_crop=0.8) for _ in range(20)]
    assert all(height * width > 0.79 * 120_000 for _, _, height, width in large)
    assert 0.19 < min(areas) < 0.3 and 0.9 < max(areas) <= 1.0
    assert 0.74 < min(ratios) < 0.8 and 1.25 < max(ratios) < 1.35


@pytest.mark.parametrize(("hflip", "low", "high"), [(0.5, 70, 130), (0.0, 0, 0), (1.0, 200, 200)])
def test_the_share_of_flipped_crops(tmp_path: Path, hflip: float, low: int, high: int) -> None:
    photos = FolderPhotos([write(tmp_path / "a.png", 64, 64)])
    data = Crops(photos, (32, 32), hflip=hflip)
    images = (data[0, sample][0] for sample in range(200))
    flipped = sum(bool(image[1, 0, 0] > image[1, 0, -1]) for image in images)
    assert low <= flipped <= high


def test_normalise_is_imagenets_and_denormalise_undoes_it() -> None:
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    got = normalise(images)
    for channel in range(3):
        wanted = (images[:, channel] / 255 - IMAGENET_MEAN[channel]) / IMAGENET_STD[channel]
        torch.testing.assert_close(got[:, channel], wanted)
    torch.testing.assert_close(denormalise(got), images / 255, atol=1e-6, rtol=0)


# -- batches --------------------------------------------------------------------------------------


def order(first: int, last: int, seed: int = 0) -> list[list[tuple[int, int]]]:
    return list(RunSampler(10, 3, 3, first, last, seed))


def test_every_epoch_is_another_permutation_in_whole_batches() -> None:
    batches = order(0, 9)
    assert [batch[0][0] for batch in batches] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    epochs = [[sample for batch in batches[i : i + 3] for _, sample in batch] for i in (0, 3, 6)]
    assert all(len(set(epoch)) == 9 and max(epoch) < 10 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert order(0, 9, seed=1) != batches


def test_a_run_that_begins_later_sees_the_same_batches() -> None:
    assert order(4, 9) == order(0, 9)[4:]
    assert len(RunSampler(10, 3, 3, 4, 9, 0)) == 5
    assert order(9, 9) == []


@pytest.mark.parametrize("first", [2, 511])
def test_workers_change_nothing(first: int) -> None:
    source = PhotoSource(DemoPhotos(), repeats=64)
    transform = PretrainTransform((32, 32))
    alone, shared = (
        list(source.batches(transform, 4, first, first + 4, seed=5, workers=workers))
        for workers in (0, 2)
    )
    assert len(alone) == 4
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.keys, other.keys)
        assert one.seconds > 0 and other.seconds > 0
    assert (alone[0].labels == -1).all()


def test_two_processes_see_what_one_sees() -> None:
    source = PhotoSource(DemoPhotos(), repeats=64)
    transform = PretrainTransform((32, 32))
    whole = source.batches(transform, 8, 62, 66, 64, seed=3)
    parts = [source.batches(transform, 4, 62, 66, 64, 3, rank, 2) for rank in (0, 1)]
    for one, *halves in zip(whole, *parts, strict=True):
        for name in ("images", "labels", "keys"):
            both = torch.cat([getattr(half, name) for half in halves])
            assert torch.equal(getattr(one, name), both)


def test_a_batch_carries_its_failures(tmp_path: Path) -> None:
    paths = broken_folder(tmp_path)
    source = PhotoSource(FolderPhotos(paths, labels=range(6)))
    (batch,) = source.batches(PretrainTransform((32, 32)), 6, 0, 1)
    assert batch.images.shape == (6, 3, 32, 32)
    assert {failure.name for failure in batch.failures} == {str(paths[i]) for i in (1, 2, 4)}
    replaced = {1: 3, 2: 3, 4: 5}  # by the next that can be read, whose label it is
    samples = batch.keys[:, 1].tolist()
    assert batch.labels.tolist() == [replaced.get(sample, sample) for sample in samples]


def test_batches_that_cannot_be_made_are_refused() -> None:
    source = PhotoSource(DemoPhotos())
    transform = PretrainTransform((32, 32))
    with pytest.raises(DataError, match="batch_size 5 in 2 processes needs 10 pictures a step"):
        source.batches(transform, 5, 0, 1, world=2)
    with pytest.raises(ValueError, match=r"batches_per_epoch must be in \[1, 2\], got 3"):
        source.batches(transform, 4, 0, 1, 3)
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\), got 2"):
        source.batches(transform, 4, 0, 1, rank=2, world=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_picture_once(tmp_path: Path, workers: int) -> None:
    paths = broken_folder(tmp_path)
    source = PhotoSource(FolderPhotos(paths, labels=range(6)))
    ranks = [
        list(source.evaluation_batches(EvalTransform((32, 32)), 2, rank, 2, workers))
        for rank in (0, 1)
    ]
    assert [len(batches) for batches in ranks] == [2, 2] == [source.evaluation_steps(2, 2)] * 2
    batches = [batch for of_rank in ranks for batch in of_rank]
    label_of = {
        sample: label
        for batch in batches
        for (_, sample), label in zip(batch.keys.tolist(), batch.labels.tolist())
    }
    assert label_of == {0: 0, 1: -1, 2: -1, 3: 3, 4: -1, 5: 5, 6: -1, 7: -1}
    named = [failure.name for batch in batches for failure in batch.failures]
    assert sorted(named) == [str(paths[i]) for i in (1, 2, 4)]
    blank = torch.cat([batch.images[batch.labels < 0] for batch in batches])
    assert len(blank) == 5 and not blank.any()


def test_loading_processes_survive_the_signals_of_the_group() -> None:
    source = PhotoSource(DemoPhotos(), repeats=64)
    batches = source.batches(PretrainTransform((32, 32)), 4, 0, 30, workers=1)
    next(batches)
    (child,) = multiprocessing.active_children()
    for name in ("INT", "TERM"):
        subprocess.run(["kill", f"-{name}", str(child.pid)], check=True)
    assert len(list(batches)) == 29
    child.join()
    assert child.exitcode == 0


@pytest.mark.thorough
def test_a_program_that_fails_ends_its_loading_processes() -> None:
    code = """
import multiprocessing
from convmae.data import PretrainTransform, open_source
batches = open_source("demo").batches(PretrainTransform((32, 32)), 4, 0, 99, workers=1)
next(batches)
print(multiprocessing.active_children()[0].pid)
raise RuntimeError("as planned")
"""
    root = ROOT
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert "as planned" in run.stderr and run.returncode == 1
    with pytest.raises(ProcessLookupError):
        os.kill(int(run.stdout), 0)


def test_an_error_is_told_without_its_process_and_ends_the_others(tmp_path: Path) -> None:
    for index in range(3):
        (tmp_path / f"{index}.png").write_text("no")
    source = PhotoSource(FolderPhotos(find_pictures(tmp_path)))
    gc.disable()  # no cycle may keep the loading processes
    try:
        with pytest.raises(DataError, match="^none of the 3 pictures can be read") as caught:
            list(source.batches(PretrainTransform((32, 32)), 1, 0, 3, workers=2))
        assert multiprocessing.active_children() == []
        assert "Traceback" not in str(caught.value)
    finally:
        gc.enable()
