"""The example that composes pictures: same bytes, true masks, nothing shared by the two parts."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples import choose_stamps, compose_pictures

SMALL = ["--train", "6", "--val", "4", "--img_size", "48", "--seed", "3"]
KINDS = {"animal": ("cat", "cat_2", "dog", "hen", "cow"), "food": ("fig", "Plums", "plum2", "nut")}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Ellipses of one colour each as cut-outs, noise of few colours as photographs."""
    folder = tmp_path_factory.mktemp("material")
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[-1:1:40j, -1:1:60j]
    for label, (name, stems) in enumerate(KINDS.items()):
        (folder / "sprites" / name).mkdir(parents=True)
        for stem in stems:
            pixels = np.zeros((40, 60, 4), np.uint8)
            pixels[..., :3] = rng.integers(0, 256, 3)
            pixels[..., label] = 255
            pixels[..., 3] = 255 * (rows**2 + columns**2 < 0.9)
            Image.fromarray(pixels).save(folder / "sprites" / name / f"{stem}.png")
    (folder / "photographs").mkdir()
    for number in range(4):
        pixels = rng.integers(0, 60, (70, 90, 3), dtype=np.uint8) + 20 * number
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "photographs" / f"{number}.png")
    return folder


def compose(material, output, *flags):
    sources = ["--sprites", material / "sprites", "--backgrounds", material / "photographs"]
    compose_pictures.main([*map(str, sources), "--output", str(output), *SMALL, *flags])
    return output


@pytest.fixture(scope="module")
def composites(material, tmp_path_factory):
    return compose(material, tmp_path_factory.mktemp("made") / "set")


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def decoded(segmentation):
    height, width = segmentation["size"]
    counts = segmentation["counts"]
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return flat.reshape(width, height).T


def test_the_same_seed_gives_the_same_bytes(material, composites, tmp_path):
    again = files(compose(material, tmp_path / "set"))
    assert again == files(composites)
    other = files(compose(material, tmp_path / "other", "--seed", "4"))
    pictures = [path for path in again if path.parts[0] == "images"]
    assert len(pictures) == 10 and all(again[path] != other[path] for path in pictures)


def test_more_pictures_leave_the_first_as_they_are(material, composites, tmp_path):
    longer = files(compose(material, tmp_path / "set", "--train", "7"))
    pictures = {path: data for path, data in files(composites).items() if path.suffix == ".png"}
    pictures.pop(Path("preview.png"))
    assert all(longer[path] == data for path, data in pictures.items())


def test_the_parts_share_no_kind_and_no_photograph(composites):
    parts = json.loads((composites / "sources.json").read_text())["sources"]
    assert sorted(parts) == ["train", "val"]
    photographs = [set(part["backgrounds"]) for part in parts.values()]
    assert all(photographs) and not photographs[0] & photographs[1]
    assert set.union(*photographs) == {f"{number}.png" for number in range(4)}
    for name, stems in KINDS.items():
        of_part = [set(part["sprites"][name]) for part in parts.values()]
        assert sum(map(len, of_part)) == len(stems)
        kinds = [{compose_pictures.kind(Path(file)) for file in one} for one in of_part]
        assert all(kinds) and not kinds[0] & kinds[1]


@pytest.mark.parametrize("part", ["train", "val"])
def test_masks_boxes_and_label_maps_agree(composites, part):
    content = json.loads((composites / "annotations" / f"instances_{part}.json").read_text())
    names = ["background", *(category["name"] for category in content["categories"])]
    assert (composites / "classes.txt").read_text().split() == names == ["background", *KINDS]
    assert [category["id"] for category in content["categories"]] == [1, 2]
    assert len({one["id"] for one in content["annotations"]}) == len(content["annotations"])
    for image in content["images"]:
        picture = Image.open(composites / "images" / part / image["file_name"])
        assert picture.mode == "RGB" and picture.size == (image["width"], image["height"])
        labels = np.asarray(Image.open(composites / "labels" / part / image["file_name"]))
        seen = np.zeros(labels.shape, int)
        objects = [one for one in content["annotations"] if one["image_id"] == image["id"]]
        assert 1 <= len(objects) <= 3
        for one in objects:
            mask = decoded(one["segmentation"])
            assert (labels[mask] == one["category_id"]).all() and mask.sum() == one["area"] > 0
            x, y, width, height = one["bbox"]
            assert mask[y : y + height, x : x + width].sum() == one["area"]
            rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
            assert (x, y) == (columns[0], rows[0])
            assert (x + width - 1, y + height - 1) == (columns[-1], rows[-1])
            seen += mask
        assert (seen == (labels > 0)).all()  # a pixel belongs to one object: that in front


def test_masks_lie_where_the_cut_outs_are(composites):
    """Cut-outs of the first class are full red, of the second full green; photographs are dark."""
    for path in sorted((composites / "images" / "train").iterdir()):
        picture = np.asarray(Image.open(path)).astype(int)
        labels = np.asarray(Image.open(composites / "labels" / "train" / path.name))
        for label in np.unique(labels[labels > 0]):
            inside = picture[..., label - 1][labels == label]
            assert np.median(inside) > picture[..., label - 1][labels == 0].mean() + 40


def test_run_lengths_are_those_of_the_coco_tools():
    mask = np.array([[1, 0, 0], [1, 1, 0]], bool)
    assert compose_pictures.run_lengths(mask) == {"size": [2, 3], "counts": [0, 2, 1, 1, 2]}
    assert compose_pictures.run_lengths(~mask)["counts"] == [2, 1, 1, 2]
    mask_api = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    mask = rng.random((7, 5)) < 0.5
    encoded = mask_api.frPyObjects(compose_pictures.run_lengths(mask), 7, 5)
    assert (mask_api.decode(encoded) == mask).all()


def test_small_targets(material, tmp_path):
    folder = compose(material, tmp_path / "tiny", "--small_targets")
    assert files(folder) == files(compose(material, tmp_path / "b" / "tiny", "--small_targets"))
    for part, count in (("train", 6), ("test", 4)):
        names = (folder / "img_idx" / f"{part}_tiny.txt").read_text().split()
        assert len(names) == count
        for name in names:
            picture = Image.open(folder / "images" / f"{name}.png")
            mask = np.asarray(Image.open(folder / "masks" / f"{name}.png"))
            assert picture.mode == "L" and picture.size == (48, 48)
            assert set(np.unique(mask)) == {0, 255} and 3 <= (mask > 0).sum() <= 3 * 11**2
            assert not mask[[0, -1]].any() and not mask[:, [0, -1]].any()
            bright = np.asarray(picture).astype(int)
            assert bright[mask > 0].mean() > bright[mask == 0].mean() + 10


def test_what_cannot_be_is_refused(material, tmp_path, capsys):
    def refusal(*flags):
        with pytest.raises(SystemExit):
            compose(material, tmp_path / "set", *flags)
        assert not any(tmp_path.iterdir())
        return capsys.readouterr().err.splitlines()[-1]

    assert "--img_size 16" in refusal("--img_size", "16")
    assert "--objects 3 1: expected two numbers" in refusal("--objects", "3", "1")
    assert "fish is no folder" in refusal("--classes", "animal", "fish")
    assert "90 x 70 pixels; expected at least --img_size, 96" in refusal("--img_size", "96")
    assert "sprites exists; name a new folder" in refusal("--output", str(material / "sprites"))


def test_cut_outs_of_one_kind_and_without_transparency(material, tmp_path, capsys):
    folder = tmp_path / "sprites" / "cat"
    folder.mkdir(parents=True)
    for name in ("cat.png", "cat-2.png"):
        Image.new("RGB", (60, 60)).save(folder / name)
    flags = ["--sprites", str(tmp_path / "sprites")]
    with pytest.raises(SystemExit):
        compose(material, tmp_path / "set", *flags)
    assert "of the kind 'cat'" in capsys.readouterr().err
    Image.new("RGB", (60, 60)).save(folder / "dog.png")
    with pytest.raises(SystemExit):
        compose(material, tmp_path / "set", *flags)
    assert "has no transparent pixel" in capsys.readouterr().err


def test_stamps_are_chosen_from_packages(tmp_path, capsys):
    """Photographs of the listed folders, without drawings and mirrored copies."""
    packages = tmp_path / "packages"
    stamps = packages / choose_stamps.STAMPS
    wanted = ["animals/birds/crow", "food/fruit/fig", "military/vehicles/tank"]
    others = ["animals/birds/cartoon/hen", "vehicles/car_mirror", "food/dessert/cake"]
    for name in (*wanted, *others):
        (stamps / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (4, 4)).save(stamps / f"{name}.png")
    photographs = {*choose_stamps.BACKGROUNDS, *choose_stamps.SKY_AND_SEA}
    for place in photographs:
        plasma = place.startswith(choose_stamps.PLASMA)
        for size in (10, 20) if plasma else (10,):
            file = f"{place}/contents/images/{size}x{size}.jpg" if plasma else place
            (packages / file).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (size, size)).save(packages / file)
    (packages / choose_stamps.PLASMA / "Kite" / "metadata.json").write_text("{}")
    for name in choose_stamps.PACKAGES:
        licence = packages / name / "usr/share/doc" / name / "copyright"
        licence.parent.mkdir(parents=True)
        licence.write_text("GPL")
    choose_stamps.main([str(packages), str(tmp_path / "stamps")])
    assert "1 of animal, 1 of food, 1 of vehicle; 30 photographs" in capsys.readouterr().out
    found = {path.stem for path in (tmp_path / "stamps" / "sprites").rglob("*.png")}
    assert found == {Path(name).name for name in wanted}
    assert Image.open(tmp_path / "stamps/backgrounds/Kite.jpg").size == (20, 20)
    assert Image.open(tmp_path / "stamps/sky_and_sea/Kite.png").size == (12, 20)
    licences = {path.name for path in (tmp_path / "stamps" / "licences").iterdir()}
    assert licences == {"Kite.json", *(f"{name}.txt" for name in choose_stamps.PACKAGES)}
    with pytest.raises(SystemExit):
        choose_stamps.main([str(tmp_path), str(tmp_path / "more")])
    assert "lacks tuxpaint-stamps-default" in capsys.readouterr().err
