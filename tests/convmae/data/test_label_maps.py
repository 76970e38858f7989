"""Label maps: every layout and kind of values that is read, and every one that is refused."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from convmae import DataError, OptionError
from convmae.config import ReadOptions
from convmae.config.label_maps import LabelMapConfig
from convmae.data import PhotoSource, UnreadableError
from convmae.data.label_maps import LabelReading, open_label_maps, read_label_map
from convmae.data.label_maps.classes import check_largest, classes_of_maps, told_classes
from convmae.data.label_maps.pairs import survey_label_maps
from tests.support.label_map_files import SIZE, ade_layout, drawn, write

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("torchvision")


def opened(root: Path, split: str = "train", reading: Any = None, **options: Any) -> PhotoSource:
    config = LabelMapConfig(**options)
    config.check_label_maps()
    return open_label_maps(str(root), split, config, reading or ReadOptions())


def names(source: PhotoSource) -> list[str]:
    return [source.photos.name(i).rpartition("/")[2] for i in range(len(source.photos))]


def checked(root: Path, reading: Any = None, **options: Any) -> tuple[Any, list[str]]:
    """What a run is told of the classes of a data set with train and val."""
    config = LabelMapConfig(**options)
    config.check_label_maps()
    sources = {s: opened(root, s, reading, **options) for s in ("train", "val")}
    surveys = {s: survey_label_maps(source, "the data") for s, source in sources.items()}
    meaning = sources["train"].photos.reading  # type: ignore[attr-defined]
    return classes_of_maps(told_classes(config, meaning), surveys, "the data", meaning)


# -- layouts --------------------------------------------------------------------------------------


def test_the_layout_of_ade20k(tmp_path: Path) -> None:
    source = opened(ade_layout(tmp_path, 3, 2))
    assert names(source) == ["p0.jpg", "p1.jpg", "p2.jpg"]
    assert names(opened(tmp_path, "val")) == ["p100.jpg", "p101.jpg"]
    assert torch.equal(source.photos.target(1), torch.from_numpy(drawn(1)[1]))  # type: ignore[attr-defined]
    assert source.photos.load(1).shape == (3, *SIZE)


def pictures_of(path: Path, *numbers: int, suffix: str = ".png") -> None:
    for number in numbers:
        write(path / f"n{number}{suffix}", drawn(number)[0])


def maps_of(path: Path, *numbers: int, suffix: str = ".png") -> None:
    for number in numbers:
        write(path / f"n{number}{suffix}", drawn(number)[1])


def split_first(root: Path) -> None:
    for split, numbers in (("train", (0, 1)), ("val", (2,))):
        pictures_of(root / split / "images", *numbers, suffix=".bmp")
        maps_of(root / split / "masks", *numbers)


def msrs(root: Path) -> None:
    for split, numbers in (("train", (0, 1)), ("test", (2,))):
        pictures_of(root / split / "vi", *numbers)
        maps_of(root / split / "Segmentation_labels", *numbers)
        for number in numbers:
            write(root / split / "ir" / f"n{number}.png", drawn(number)[1] * 100)


def voc(root: Path) -> None:
    pictures_of(root / "JPEGImages", 0, 1, 2, 3, suffix=".jpg")
    maps_of(root / "SegmentationClass", 0, 1, 2)
    (root / "Annotations").mkdir()
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("n0\nn1\n")
    (lists / "val.txt").write_text("n2\n")


def irstd(root: Path) -> None:
    pictures_of(root / "images", 0, 1, 2)
    maps_of(root / "masks", 0, 1, 2, suffix=".bmp")
    (root / "img_idx").mkdir()
    (root / "img_idx" / "train_IRSTD-1K.txt").write_text("n0\nn1\n\n")
    (root / "img_idx" / "test_IRSTD-1K.txt").write_text("n2")


def irstd_of_the_authors(root: Path) -> None:
    pictures_of(root / "IRSTD1k_Img", 0, 1, 2)
    maps_of(root / "IRSTD1k_Label", 0, 1, 2)
    (root / "trainval.txt").write_text("n0.png\nn1.png\n")
    (root / "test.txt").write_text("n2.png\n")


def soda(root: Path) -> None:
    pictures_of(root / "JPEGImages", 0, 1, 2, suffix=".jpg")
    write(root / "JPEGImages" / "n0 (1).jpg", drawn(0)[0])  # duplicates that no list names
    maps_of(root / "SegmentationClassOne", 0, 1, 2)
    (root / "train_infrared.txt").write_text("n0 x\nn1 x\n")
    (root / "test_infrared.txt").write_text("n2 x\n")


@pytest.mark.parametrize(
    "make", [split_first, msrs, voc, irstd, irstd_of_the_authors, soda], ids=lambda f: f.__name__
)
def test_layouts(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path)
    for split, numbers in (("train", (0, 1)), ("val", (2,))):
        source = opened(tmp_path, split)
        assert [name.partition(".")[0] for name in names(source)] == [f"n{n}" for n in numbers]
        for place, number in enumerate(numbers):
            target = source.photos.target(place)  # type: ignore[attr-defined]
            assert torch.equal(target, torch.from_numpy(drawn(number)[1]))


def test_folders_and_lists_of_other_names(tmp_path: Path) -> None:
    pictures_of(tmp_path / "left", 0, 1, 2)
    maps_of(tmp_path / "truth", 0, 1, 2)
    (tmp_path / "mine.txt").write_text("left/n2.png\n")
    folders = {"image_folder": "left", "label_folder": "truth"}
    assert names(opened(tmp_path, train_list="mine.txt", **folders)) == ["n2.png"]
    assert names(opened(tmp_path, "val", val_list=str(tmp_path / "mine.txt"), **folders)) == [
        "n2.png"
    ]
    whole = open_label_maps(
        str(tmp_path), "val", LabelMapConfig(**folders), ReadOptions(), undivided=True
    )
    assert len(whole.photos) == 3


def test_label_maps_may_have_a_suffix_and_max_samples_are_chosen_in_pairs(tmp_path: Path) -> None:
    ade_layout(tmp_path, 6, 1)
    for path in list((tmp_path / "annotations" / "training").iterdir()):
        path.rename(path.with_name(f"{path.stem}_mask.png"))
    config = LabelMapConfig(label_suffix="_mask")
    source = open_label_maps(str(tmp_path), "train", config, ReadOptions(), max_samples=3, seed=1)
    assert len(source.photos) == 3
    for place, name in enumerate(names(source)):
        classes = drawn(int(name[1:].partition(".")[0]))[1]
        assert torch.equal(source.photos.target(place), torch.from_numpy(classes))  # type: ignore[attr-defined]


# -- pictures -------------------------------------------------------------------------------------


def test_a_second_picture_becomes_channels(tmp_path: Path) -> None:
    msrs(tmp_path)
    source = opened(tmp_path, second_images="ir")
    assert (source.channels, source.dtype) == (4, torch.uint8)
    image = source.photos.load(1)
    picture, classes = drawn(1)
    assert torch.equal(image[:3], torch.from_numpy(picture).permute(2, 0, 1))
    assert torch.equal(image[3], torch.from_numpy(classes * 100))
    assert opened(tmp_path, second_images="ir", second_chans=3).channels == 6
    alone = opened(tmp_path, image_folder="ir", reading=ReadOptions(in_chans=1))
    assert torch.equal(alone.photos.load(1)[0], image[3])
    fingerprint = source.fingerprint()
    assert fingerprint is not None and fingerprint.count == 6
    write(tmp_path / "train" / "ir" / "n1.png", classes[:-2] * 100)
    with pytest.raises(UnreadableError, match="40 x 56 pixels, but .*ir/n1.png has 38 x 56"):
        source.photos.load(1)
    (tmp_path / "train" / "ir" / "n0.png").unlink()
    with pytest.raises(DataError, match="1 of 2 second pictures are missing .*: n0;"):
        opened(tmp_path, second_images="ir")


def test_the_alpha_channel_and_other_kinds_of_pictures(tmp_path: Path) -> None:
    """MFNet has the thermal picture as alpha; 16-bit, float and 12 bands come as they are."""
    picture, classes = drawn(0)
    rng = np.random.default_rng(0)
    thermal = rng.integers(0, 256, SIZE, dtype=np.uint8)
    cases: list[tuple[str, np.ndarray, Any, int, torch.dtype]] = [
        ("n0.png", np.dstack([picture, thermal]), ReadOptions(bands=(1, 2, 3, 4)), 4, torch.uint8),
        ("n0.png", rng.integers(0, 60000, SIZE).astype(np.uint16), None, 1, torch.uint16),
        (
            "n0.npy",
            rng.normal(size=(12, *SIZE)).astype(np.float32),
            ReadOptions(layout="chw"),
            12,
            torch.float32,
        ),
    ]
    for name, values, reading, channels, dtype in cases:
        root = tmp_path / f"{channels}"
        write(root / "train" / "images" / name, values)
        maps_of(root / "train" / "labels", 0)
        source = opened(root, reading=reading)
        assert (source.channels, source.dtype) == (channels, dtype)
        survey = survey_label_maps(source, "the data")
        assert survey.pixels[:3].tolist() == np.bincount(classes.ravel(), minlength=3).tolist()
    assert torch.equal(
        opened(tmp_path / "4", reading=cases[0][2]).photos.load(0)[3], torch.from_numpy(thermal)
    )


# -- values ---------------------------------------------------------------------------------------


def read(path: Path, **options: Any) -> list[int]:
    reading = LabelReading.of(LabelMapConfig(**options), ReadOptions())
    return read_label_map(path, reading).ravel().tolist()


def test_index_maps(tmp_path: Path) -> None:
    values = np.array([[0, 1, 2, 7, 255]], np.uint8)
    grey = write(tmp_path / "grey.png", values)
    assert read(grey) == [0, 1, 2, 7, 255]
    assert read(grey, reduce_zero_label=True) == [255, 0, 1, 6, 255]
    indexed = Image.fromarray(values)
    indexed.putpalette([9, 8, 7] * 256)  # all of one colour: the indices count
    indexed.save(tmp_path / "indexed.png")
    assert read(tmp_path / "indexed.png") == [0, 1, 2, 7, 255]
    three = write(tmp_path / "three.png", np.repeat(values[..., None], 3, 2))
    assert read(three) == [0, 1, 2, 7, 255]
    deep = write(tmp_path / "deep.png", np.array([[0, 254, 1000]], np.uint16))
    assert read(deep, ignore_label=1000) == [0, 254, 255]
    array = write(tmp_path / "array.npy", np.array([[0, -1, 3]]))
    assert read(array, ignore_label=-1) == [0, 255, 3]


def test_masks(tmp_path: Path) -> None:
    mask = write(tmp_path / "mask.png", np.array([[0, 127, 128, 255]], np.uint8))
    assert read(mask, binary_masks=True) == [0, 0, 1, 1]
    coloured = np.zeros((1, 2, 3), np.uint8)
    coloured[0, 1] = 255, 0, 0  # the first channel counts
    assert read(write(tmp_path / "c.png", coloured), binary_masks=True) == [0, 1]
    assert read(write(tmp_path / "b.png", np.array([[True, False]])), binary_masks=True) == [1, 0]


def test_maps_in_the_colours_of_a_palette(tmp_path: Path) -> None:
    palette = tmp_path / "palette.txt"
    palette.write_text("0 0 0 ground\n255,128,0,tall tree\n\n#0000ff water\n255 255 255 ignore\n")
    colours = np.array([[[0, 0, 0], [255, 128, 0], [0, 0, 255], [255, 255, 255]]], np.uint8)
    path = write(tmp_path / "map.png", colours)
    assert read(path, palette=str(palette)) == [0, 1, 2, 255]
    reading = LabelReading.of(LabelMapConfig(palette=str(palette)), ReadOptions())
    assert told_classes(LabelMapConfig(), reading) == ("ground", "tall tree", "water")
    colours[0, 2] = 1, 2, 3
    write(path, colours)
    with pytest.raises(UnreadableError, match="colour 1 2 3 .row 0, column 2. is not in --palette"):
        read(path, palette=str(palette))
    with pytest.raises(UnreadableError, match="a picture in colours.*--palette FILE"):
        read(path)
    for text, message in (
        ("0 0 0\n300 0 0\n", "line 2 is '300 0 0'; expected red"),
        ("0 0 0\nblack\n", "line 2 is 'black'"),
        ("0 0 0\n1 1 1\n0 0 0\n", "line 3 has a colour that an earlier line has"),
        ("0 0 0 a\n1 1 1\n", "the name of class 1 is empty"),
        ("\n", "is empty; expected a line for each class"),
    ):
        palette.write_text(text)
        with pytest.raises(DataError, match=message):
            read(path, palette=str(palette))
    with pytest.raises(DataError, match="palette .*nowhere.txt' cannot be read"):
        read(path, palette=str(tmp_path / "nowhere.txt"))


# -- classes --------------------------------------------------------------------------------------


def test_classes_are_told_or_counted(tmp_path: Path) -> None:
    ade_layout(tmp_path / "data", 3, 2)
    classes, notes = checked(tmp_path / "data")
    assert classes == ("0", "1", "2")
    assert (
        notes[0].startswith("3 label maps (train) read and checked in ") and "0 83.1 %" in notes[0]
    )
    classes, notes = checked(tmp_path / "data", nb_classes=5)
    assert classes == ("0", "1", "2", "3", "4")
    assert "note: no label map of the data has a pixel of '3', '4'" in notes
    (tmp_path / "names.txt").write_text("ground\nred box\nblue box\n")
    named = {"class_names": str(tmp_path / "names.txt")}
    assert checked(tmp_path / "data", **named)[0] == ("ground", "red box", "blue box")
    with pytest.raises(DataError, match="nb_classes 2 is fewer than the 3 classes of class_names"):
        checked(tmp_path / "data", nb_classes=2, **named)
    (tmp_path / "names.txt").write_text("ground\nbox\nbox\n")
    with pytest.raises(DataError, match="classes 1 and 2 have the same name, 'box'"):
        checked(tmp_path / "data", **named)


def test_values_beyond_the_classes_are_refused_by_name(tmp_path: Path) -> None:
    ade_layout(tmp_path, 3, 2)
    wrong = drawn(1)[1]
    wrong[0, 0] = 9
    write(tmp_path / "annotations" / "training" / "p1.png", wrong)
    with pytest.raises(DataError) as caught:
        checked(tmp_path, nb_classes=3)
    message = str(caught.value)
    assert "1 of 3 label maps of the data (train) have values beyond the 3 classes: " in message
    assert "p1.png has 9; expected 0 to 2, or 255" in message
    assert "reduce_zero_label" in message
    survey = survey_label_maps(opened(tmp_path), "x")
    check_largest(survey, 10, "x", LabelReading())
    photos = opened(tmp_path).photos
    photos.count = 3  # type: ignore[attr-defined]
    with pytest.raises(UnreadableError, match="p1.png has class 9; expected 0 to 2"):
        photos.target(1)  # type: ignore[attr-defined]


def test_masks_are_not_taken_for_class_numbers_nor_these_for_masks(tmp_path: Path) -> None:
    for split in ("train", "val"):
        pictures_of(tmp_path / split / "images", 0)
        write(tmp_path / split / "masks" / "n0.png", (drawn(0)[1] > 0).astype(np.uint8) * 255)
    with pytest.raises(DataError, match="hold 0 and 255 alone.*give binary_masks"):
        checked(tmp_path)
    assert checked(tmp_path, binary_masks=True)[0] == ("background", "target")
    for split in ("train", "val"):
        write(tmp_path / split / "masks" / "n0.png", (drawn(0)[1] > 0).astype(np.uint8))
    with pytest.raises(DataError, match="no mask of the data has a value above 127"):
        checked(tmp_path, binary_masks=True)
    assert checked(tmp_path)[0] == ("0", "1")


# -- refusals -------------------------------------------------------------------------------------


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    maps = ade_layout(tmp_path, 7, 1) / "annotations" / "training"
    shutil.copy(maps / "p3.png", maps / "p3.bmp")
    with pytest.raises(DataError, match="more than once in .*: p3.(png and p3.bmp|bmp and p3.png)"):
        opened(tmp_path)
    (maps / "p3.bmp").unlink()
    write(maps / "extra.png", drawn(0)[1])
    source = opened(tmp_path)
    assert len(source.photos) == 7
    assert list(map(str, source.left_out)) == [
        f"1 file in {maps} is left out: 1 without a picture (extra.png)"
    ]
    for number in range(6):
        (maps / f"p{number}.png").unlink()
    with pytest.raises(DataError) as caught:
        opened(tmp_path)
    assert "6 of 7 label maps are missing" in str(caught.value)
    assert "p0, p1, p2, p3, p4 and 1 more; expected a file of that name" in str(caught.value)
    write(maps / "p0.jpg", drawn(0)[1])
    with pytest.raises(DataError, match="JPEG files are not read as such"):
        opened(tmp_path)


def test_maps_of_other_sizes_are_refused_and_broken_ones_counted(tmp_path: Path) -> None:
    maps = ade_layout(tmp_path, 4, 1) / "annotations" / "training"
    (maps / "p2.png").write_bytes((maps / "p2.png").read_bytes()[:60])
    source = open_label_maps(str(tmp_path), "train", LabelMapConfig(), ReadOptions(), 0.3)
    survey = survey_label_maps(source, "the data")
    (failure,) = survey.failures
    assert failure.name.endswith("p2.jpg") and "its label map" in failure.reason
    with pytest.raises(DataError, match="1 of 4 pictures cannot be read"):
        survey_label_maps(opened(tmp_path), "the data")
    write(maps / "p1.png", drawn(1)[1][:, :50])
    with pytest.raises(DataError) as caught:
        survey_label_maps(source, "the data")
    message = str(caught.value)
    assert message.startswith("1 of 4 label maps of the data cannot be used: ")
    assert "p1.png: it has 40 x 50 pixels, but the picture" in message and "40 x 56" in message


def test_lists_and_folders_that_cannot_be_used(tmp_path: Path) -> None:
    irstd(tmp_path)
    lists = tmp_path / "img_idx"
    for text, message in (
        ("n0\nn7\n", "1 of 2 pictures are missing in .*images, which .*txt needs: n7;"),
        ("n0\nn0\n", "names n0 twice"),
        ("\n", "names no picture"),
    ):
        (lists / "train_IRSTD-1K.txt").write_text(text)
        with pytest.raises(DataError, match=message):
            opened(tmp_path)
    (lists / "train_other.txt").write_text("n0\n")
    with pytest.raises(DataError, match="several lists of train pictures: .*choose one by train_l"):
        opened(tmp_path)
    with pytest.raises(DataError, match="val_list 'no.txt' is no file"):
        opened(tmp_path, "val", val_list="no.txt")
    shutil.rmtree(lists)
    with pytest.raises(DataError, match="has no train pictures: .*no list train.txt or trainval"):
        opened(tmp_path)
    with pytest.raises(DataError, match="for a folder truth, found images, masks; give its name"):
        opened(tmp_path, label_folder="truth")
    with pytest.raises(DataError, match="does not exist"):
        opened(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"palette": "p", "binary_masks": True}, "binary_masks means nothing beside palette"),
        ({"binary_masks": True, "ignore_label": 3}, "ignore_label means nothing beside binary"),
        ({"binary_masks": True, "nb_classes": 3}, "binary_masks have 2 classes"),
        ({"nb_classes": 1}, "nb_classes must be a whole number at least 2"),
        ({"second_chans": 1}, "second_chans 1 has no effect without second_images"),
        ({"class_names": " "}, "class_names must not be empty"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        LabelMapConfig(**options).check_label_maps()


def test_options_are_taken_from_the_run_of_a_checkpoint() -> None:
    run = {"reduce_zero_label": True, "nb_classes": 7, "second_images": "ir", "epochs": 3}
    taken = LabelMapConfig().label_maps_over(run)
    assert taken.label_options() == {"reduce_zero_label": True, "second_images": "ir"}
    other = LabelMapConfig(binary_masks=True).label_maps_over(run)
    assert other.label_options() == {"binary_masks": True, "second_images": "ir"}
