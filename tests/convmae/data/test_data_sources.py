"""What lies at a path is told apart, labelled and checked: pictures, .npy arrays, IDX files."""

from __future__ import annotations

import gzip
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from convmae.data import (
    CentreTransform,
    DataError,
    EvalTransform,
    PretrainTransform,
    Statistics,
    open_source,
)
from convmae.data.crops import resized
from convmae.data.idx import read_idx
from convmae.data.source import ExpectedLabels
from convmae.data.statistics import far_apart
from tests.support.paths import FASHION

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("torchvision")


def write(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 16), (value, 0, 0)).save(path)
    return path


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)
    return path


def labels_of(source) -> dict[str, int]:
    photos = source.photos
    return {Path(photos.name(i)).name: photos.label(i) for i in range(len(photos))}


# -- folders of pictures --------------------------------------------------------------------------


def test_a_flat_folder_has_no_classes(tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    write(tmp_path / "more" / "b.png")
    source = open_source(tmp_path)
    assert source.classes is None and labels_of(source) == {"a.png": -1, "b.png": -1}
    assert (source.channels, source.dtype) == (3, torch.uint8)
    assert (source.pictures, source.samples_per_epoch) == (2, 2)


@pytest.mark.parametrize("inside", ["train", "."])
def test_classes_are_the_sorted_folders(tmp_path: Path, inside: str) -> None:
    for name in ("wolf/a.png", "cat/deep/b.png", "Dog/c.png"):
        write(tmp_path / inside / name)
    (tmp_path / inside / "Ape").mkdir()  # empty: no class
    source = open_source(str(tmp_path))
    assert source.classes == ["Dog", "cat", "wolf"]
    assert labels_of(source) == {"a.png": 2, "b.png": 1, "c.png": 0}


@pytest.mark.parametrize("name", ["val", "test"])
def test_val_has_classes_of_its_own(tmp_path: Path, name: str) -> None:
    for file in ("a/1.png", "b/2.png", "c/3.png"):
        write(tmp_path / "train" / file)
    write(tmp_path / name / "c" / "4.png")
    source = open_source(tmp_path, "val")
    assert source.classes == ["c"] and labels_of(source) == {"4.png": 0}
    (tmp_path / name / "a").mkdir()
    (tmp_path / name / ".hidden").mkdir()
    assert open_source(tmp_path, "val").empty_classes == ("a",)
    source.expect_labels(ExpectedLabels(3, (2,)))  # of the classes of train
    (batch,) = source.evaluation_batches(CentreTransform((8, 8)), 2, workers=0)
    assert batch.labels.tolist() == [2, -1]


def test_folders_are_sorted_in_one_form_of_unicode(tmp_path: Path) -> None:
    """As macOS may write them."""
    for name in ("e\u0301t", "ez", "\u00e9a"):
        write(tmp_path / name / f"{len(name)}.png")
    source = open_source(tmp_path)
    assert source.classes == ["ez", "\u00e9a", "e\u0301t"]
    assert [source.photos.label(i) for i in range(3)] == [0, 2, 1]


def test_a_picture_beside_class_folders_is_named(tmp_path: Path) -> None:
    for file in ("a/1.png", "b/2.png", "sheet.png"):
        write(tmp_path / file)
    source = open_source(tmp_path)
    assert source.classes is None
    assert f"1 of 3 pictures lie in no class folder, the first {tmp_path}" in source.no_classes


def test_pictures_that_are_not_divided(tmp_path: Path) -> None:
    """Read as `val` on request alone; a class may be called train."""
    for file in ("bus/1.png", "car/2.png"):
        write(tmp_path / file)
    assert open_source(tmp_path, "val", undivided=True).classes == ["bus", "car"]
    with pytest.raises(DataError, match="has no val pictures"):
        open_source(tmp_path, "val")
    write(tmp_path / "train" / "3.png")
    assert open_source(tmp_path, "val", undivided=True).classes == ["bus", "car", "train"]
    write(tmp_path / "val" / "bus" / "4.png")
    assert open_source(tmp_path, "val", undivided=True).pictures == 1
    write(tmp_path / "other" / "train" / "x" / "5.png")
    with pytest.raises(DataError, match="found .*train alone, which split train reads"):
        open_source(tmp_path / "other", "val", undivided=True)


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    write(tmp_path / "train" / "a.png")
    with pytest.raises(DataError, match=r"no val pictures: looked for .*val or .*test"):
        open_source(tmp_path, "val")
    (tmp_path / "train").rename(tmp_path / "val")
    with pytest.raises(DataError, match=r"no train pictures: looked for .*train; found .*val"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match="split must be 'train' or 'val', got 'valid'"):
        open_source(tmp_path, "valid")


def test_too_many_broken_files_are_refused_and_few_are_named(tmp_path: Path) -> None:
    for index in range(8):
        write(tmp_path / f"{index}.png")
    (tmp_path / "3.png").write_text("no")
    with pytest.raises(DataError, match=r"1 of 8 pictures cannot be read .* allows. The first:"):
        open_source(tmp_path)
    source = open_source(tmp_path, max_unreadable=0.2)
    assert source.failures == [(str(tmp_path / "3.png"), "not a picture that Pillow knows")]


def test_demo() -> None:
    train, val = open_source("demo"), open_source("demo", "val")
    assert (train.pictures, train.samples_per_epoch) == (8, 512) == (val.pictures, 512)
    assert open_source("demo", max_samples=2).samples_per_epoch == 128
    assert val.preview(20, (32, 48)).shape == (8, 3, 32, 48)


# -- arrays ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize(
    ("shape", "channels"),
    [((20, 30), 1), ((20, 30, 4), 4), ((3, 20, 30), 3), ((20, 5, 3), 3), ((20, 30, 1), 1)],
)
def test_arrays_keep_their_values(tmp_path: Path, shape, channels: int, dtype) -> None:
    rng = np.random.default_rng(0)
    array = (rng.random(shape) * np.iinfo(np.uint16).max).astype(dtype)
    save(tmp_path / "a.npy", array)
    source = open_source(tmp_path)
    assert source.channels == channels and source.dtype == getattr(torch, dtype.__name__)
    image = source.photos.load(0)
    first = len(shape) == 3 and shape[0] < shape[2]
    wanted = array if first else np.moveaxis(array.reshape(*shape[:2], channels), -1, 0)
    assert np.array_equal(image.numpy(), wanted)
    box = (1, 2, 2, 1)
    cropped = source.photos.crop(0, lambda h, w: box, (8, 8))
    assert torch.equal(cropped, resized(image[:, 1:3, 2:3], (8, 8)))
    (batch,) = source.batches(PretrainTransform((16, 16)), 1, 0, 1, workers=1)
    assert batch.images.shape == (1, channels, 16, 16) and batch.images.dtype == source.dtype


def test_sixteen_bits_are_resized_in_range() -> None:
    image = torch.zeros(1, 16, 16, dtype=torch.uint16)
    image[:, :, 8:] = 65535
    got = resized(image, (64, 64)).int()
    assert (got.min(), got.max()) == (0, 65535)  # bicubic overshoots: clamped, not wrapped
    assert torch.equal(got[:, :, :20], torch.zeros(1, 64, 20, dtype=torch.int))
    flat = torch.full((1, 16, 16), 40_001, dtype=torch.uint16)
    assert (resized(flat, (7, 9)).int() == 40_001).all()


def test_many_pictures_in_one_file(tmp_path: Path) -> None:
    values = np.arange(5 * 20 * 20 * 2, dtype=np.uint16).reshape(5, 20, 20, 2)
    save(tmp_path / "x" / "a.npy", values)
    save(tmp_path / "y" / "b.npy", values[:2] + 1)
    source = open_source(tmp_path)
    photos = source.photos
    assert source.classes == ["x", "y"] and source.pictures == 7
    assert [photos.label(i) for i in range(7)] == [0] * 5 + [1] * 2
    assert photos.name(3).endswith("a.npy[3]") and photos.name(6).endswith("b.npy[1]")
    assert np.array_equal(photos.load(3).numpy(), np.moveaxis(values[3], -1, 0))
    assert np.array_equal(photos.load(6).numpy(), np.moveaxis(values[1], -1, 0) + 1)


def test_other_byte_orders_and_doubles(tmp_path: Path) -> None:
    values = np.linspace(0, 1, 64).reshape(8, 8)
    save(tmp_path / "a.npy", values)
    save(tmp_path / "b.npy", values.astype(">f4"))
    source = open_source(tmp_path)
    assert source.dtype == torch.float32
    assert torch.equal(source.photos.load(0), source.photos.load(1))


def test_arrays_that_differ_are_named_and_replaced(tmp_path: Path) -> None:
    for index in range(6):
        save(tmp_path / "class" / f"{index}.npy", np.full((8, 8, 2), index, dtype=np.uint8))
    save(tmp_path / "other" / "3.npy", np.zeros((8, 8, 3), dtype=np.uint8))
    save(tmp_path / "other" / "4.npy", np.zeros((8, 8, 2), dtype=np.uint16))
    with pytest.raises(DataError, match="2 of 8 pictures cannot be read"):
        open_source(tmp_path)
    source = open_source(tmp_path, max_unreadable=0.5)
    reasons = [failure.reason for failure in source.failures]
    assert reasons == [
        "3 channels of uint8, where other pictures have 2 of uint8",
        "2 channels of uint16, where other pictures have 2 of uint8",
    ]
    (batch,) = source.batches(CentreTransform((4, 4)), 8, 0, 1)
    assert {Path(failure.name).name for failure in batch.failures} == {"3.npy", "4.npy"}
    assert batch.labels.tolist() == [0] * 8  # the replacement's


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    data, trap = tmp_path / "data", tmp_path / "trap"
    for index in range(2):
        save(data / f"{index}.npy", np.zeros((8, 8), dtype=np.uint8))
    save(data / "2.npy", np.array([[Payload(trap)]], dtype=object))
    (data / "3.npy").write_bytes(pickle.dumps(Payload(trap)))
    source = open_source(data, max_unreadable=0.5)
    list(source.batches(CentreTransform((4, 4)), 4, 0, 1))
    assert [Path(failure.name).name for failure in source.failures] == ["2.npy", "3.npy"]
    assert not trap.exists()
    np.load(data / "2.npy", allow_pickle=True)
    assert trap.exists()  # the trap would have sprung


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((8, 8), dtype=np.complex64), "an array of complex64; expected whole or real"),
        (np.zeros(8, dtype=np.uint8), r"an array of shape \[8\]; expected \[H, W\]"),
        (np.zeros((8, 0), dtype=np.uint8), r"an array of shape \[8, 0\]"),
    ],
)
def test_arrays_that_are_no_pictures(tmp_path: Path, array: np.ndarray, reason: str) -> None:
    save(tmp_path / "a.npy", array)
    with pytest.raises(DataError, match=f"none of the 1 arrays can be read.*a.npy: {reason}"):
        open_source(tmp_path)


def test_values_that_are_not_finite_are_unreadable(tmp_path: Path) -> None:
    for index in range(3):
        array = np.zeros((8, 8), dtype=np.float32)
        array[0, 0] = np.nan if index == 1 else 0
        save(tmp_path / f"{index}.npy", array)
    (batch,) = open_source(tmp_path).batches(EvalTransform((4, 4)), 3, 0, 1)
    assert [failure.reason for failure in batch.failures] == [
        "the picture holds NaN or infinite values; --nodata nan leaves NaN out"
    ]
    assert torch.isfinite(batch.images).all()


def test_a_cut_array_is_named(tmp_path: Path) -> None:
    for index in range(4):
        save(tmp_path / f"{index}.npy", np.zeros((8, 8), dtype=np.uint8))
    data = (tmp_path / "0.npy").read_bytes()
    (tmp_path / "0.npy").write_bytes(data[:-1])
    (failure,) = open_source(tmp_path, max_unreadable=0.3).failures
    assert failure.name == str(tmp_path / "0.npy")


def test_arrays_and_pictures_do_not_mix(tmp_path: Path) -> None:
    save(tmp_path / "a.npy", np.zeros((8, 8), dtype=np.uint8))
    write(tmp_path / "b.png")
    with pytest.raises(DataError, match="files of two kinds, a.npy and b.png"):
        open_source(tmp_path)


# -- IDX ------------------------------------------------------------------------------------------


def test_fashion_mnist() -> None:
    train, val = open_source(FASHION), open_source(FASHION, "val")
    assert (train.pictures, val.pictures) == (600, 200)
    assert train.classes == val.classes == [str(label) for label in range(10)]
    assert (train.channels, train.dtype) == (1, torch.uint8)
    for source, each in ((train, 60), (val, 20)):
        labels = torch.tensor([source.photos.label(i) for i in range(source.pictures)])
        assert torch.bincount(labels).tolist() == [each] * 10
    image = train.photos.load(0)
    assert image.shape == (1, 28, 28) and image.max() > 200
    preview = train.preview(5, (32, 32))
    assert preview.shape == (5, 1, 32, 32) and preview.float().std() > 20


def test_idx_unpacked_and_in_the_layout_of_torchvision(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in FASHION.glob("*.gz"):
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    source, packed = open_source(tmp_path, "val"), open_source(FASHION, "val")
    assert torch.equal(source.photos.load(7), packed.photos.load(7))
    assert source.photos.label(7) == packed.photos.label(7)


def test_broken_idx_files_are_named(tmp_path: Path) -> None:
    shutil.copytree(FASHION, tmp_path / "a")
    images = tmp_path / "a" / "train-images-idx3-ubyte.gz"
    packed = images.read_bytes()
    data = gzip.decompress(packed)
    broken = {
        "cannot be read": [packed[:-100], packed[:2000], b"plain"],
        "holds 200 bytes, .* cannot be packed into it": [packed[:200]],
        "holds .* bytes, but its header says": [gzip.compress(data[:-1])],
        "is no IDX file of unsigned bytes with 3 axes": [
            gzip.compress(b"\0\0\x0d\3" + data[4:]),
            gzip.compress(data[:7]),
        ],
    }
    for message, contents in broken.items():
        for content in contents:
            images.write_bytes(content)
            with pytest.raises(DataError, match=f"train-images-idx3-ubyte.gz {message}"):
                open_source(tmp_path / "a")
    flipped = bytearray(packed)
    flipped[-8] ^= 255  # of the checksum
    images.write_bytes(bytes(flipped))
    with pytest.raises(DataError, match="train-images-idx3-ubyte.gz cannot be read: CRC"):
        open_source(tmp_path / "a")
    (tmp_path / "a" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="lacks t10k-labels-idx1-ubyte"):
        open_source(tmp_path / "a", "val")


def test_as_many_labels_as_pictures(tmp_path: Path) -> None:
    shutil.copytree(FASHION, tmp_path / "a")
    shutil.copy(FASHION / "t10k-labels-idx1-ubyte.gz", tmp_path / "a/train-labels-idx1-ubyte.gz")
    with pytest.raises(DataError, match="600 pictures and 200 labels of train"):
        open_source(tmp_path / "a")
    assert read_idx(FASHION / "train-labels-idx1-ubyte.gz", 1).shape == (600,)


# -- a part of the pictures -----------------------------------------------------------------------


@pytest.mark.parametrize(("count", "least", "most"), [(50, 5, 5), (57, 5, 6), (7, 0, 1)])
def test_max_samples_are_balanced_and_seeded(count: int, least: int, most: int) -> None:
    chosen = [open_source(FASHION, max_samples=count, seed=seed).photos for seed in (0, 0, 1)]
    labels = torch.tensor([chosen[0].label(i) for i in range(count)])
    each = torch.bincount(labels, minlength=10)
    assert (len(chosen[0]), int(each.min()), int(each.max())) == (count, least, most)
    names = [[photos.name(i) for i in range(count)] for photos in chosen]
    assert names[0] == names[1] != names[2]
    assert len(set(names[0])) == count


def test_small_classes_give_what_they_have(tmp_path: Path) -> None:
    for index in range(9):
        write(tmp_path / ("few" if index < 2 else "many") / f"{index}.png")
    (tmp_path / "many" / "8.png").write_text("broken")
    source = open_source(tmp_path, max_unreadable=0.2, max_samples=6)
    labels = list(labels_of(source).values())
    assert sorted(labels) == [0, 0, 1, 1, 1, 1] and source.pictures == 6
    assert "8.png" not in labels_of(source) and source.failures == []
    for count in (0, 9):
        with pytest.raises(DataError, match=rf"max_samples must be in \[1, 8\].*got {count}"):
            open_source(tmp_path, max_unreadable=0.2, max_samples=count)


# -- measured -------------------------------------------------------------------------------------


def test_statistics_that_were_not_made_for_the_pictures() -> None:
    used = Statistics((0.5, 0.5, 0.5, 0.5), (0.2, 0.2, 0.2, 0.2))
    measured = Statistics((0.89, 0.91, 0.5, 0.5), (0.2, 0.2, 1.9, 2.1))
    assert far_apart(used, measured) == [1, 3]
    assert far_apart(used, Statistics((0.5,) * 4, (0.021, 0.019, 0.0, 0.2))) == [1, 2]
    assert far_apart(used, used) == []
