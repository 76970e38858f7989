"""Annotations of objects: each form is read into the same one, repaired and counted, or refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_masks

from convmae.config.objects import ObjectOptions
from convmae.data import DataError
from convmae.data.objects.coco import as_coco, read_coco
from convmae.data.objects.open import open_objects
from convmae.data.objects.voc import read_voc
from convmae.data.objects.yolo import read_yolo
from tests.support.object_files import (
    BOXES,
    CLASSES,
    SIZE,
    coco_json,
    voc_xml,
    write_coco,
    write_m3fd,
    write_picture,
    write_voc,
    write_yolo,
    yolo_text,
)

USUAL = ObjectOptions()


def boxes_of(annotations: Any) -> dict[str, list[Any]]:
    """Names of classes and boxes by the name of the picture without its ending."""
    return {
        picture.name.rpartition(".")[0].removeprefix("train-").removeprefix("val-"): [
            (annotations.classes[label], tuple(map(round, box)))
            for label, box in zip(picture.labels.tolist(), picture.boxes.tolist())
        ]
        for picture in annotations.pictures
    }


def some(*stems: str) -> dict[str, Any]:
    return {stem: BOXES[stem] for stem in stems}


# -- the forms ------------------------------------------------------------------------------------


def test_coco_layout(tmp_path):
    source = open_objects(str(write_coco(tmp_path)), "train", USUAL, keep_empty=True)
    assert boxes_of(source.annotations) == BOXES
    assert source.annotations.category_ids == [3, 90]
    assert source.annotations.has_masks
    assert (source.channels, source.pictures) == (3, 4)
    dropped = open_objects(str(tmp_path), "train", USUAL, keep_empty=False)
    assert boxes_of(dropped.annotations) == some("a", "b", "c")
    assert any("1 of 4 pictures have no object" in note for note in dropped.notes)


def test_voc_layout(tmp_path):
    root = str(write_voc(tmp_path))
    assert boxes_of(open_objects(root, "train", USUAL).annotations) == some("a", "b")
    val = open_objects(root, "val", USUAL)
    assert boxes_of(val.annotations) == some("c", "d")
    assert val.annotations.classes == ["square"]  # no list was given: what occurs
    names = tmp_path / "names.txt"
    names.write_text("disc\nsquare\n")
    named = open_objects(root, "val", ObjectOptions(class_names="names.txt"))
    assert named.annotations.classes == list(CLASSES)
    assert boxes_of(named.annotations) == some("c", "d")


@pytest.mark.parametrize("names", ["names: {0: disc, 1: square}", "names: [disc, square]"])
def test_yolo_layout(tmp_path, names):
    root = write_yolo(tmp_path, names)
    for path in (root, root / "data.yaml"):
        source = open_objects(str(path), "train", USUAL)
        assert boxes_of(source.annotations) == some("a", "b")
        assert source.annotations.classes == list(CLASSES)
    val = open_objects(str(root), "val", USUAL)
    assert boxes_of(val.annotations) == some("c", "d")
    assert any("1 pictures have no file" in note for note in val.notes)


def test_yolo_list_file(tmp_path):
    root = write_yolo(tmp_path)
    (root / "few.txt").write_text("./images/train/b.png\n")
    text = (root / "data.yaml").read_text().replace("train: images/train", "train: few.txt")
    (root / "data.yaml").write_text(text)
    assert boxes_of(open_objects(str(root), "train", USUAL).annotations) == {"train/b": BOXES["b"]}


def test_yolo_polygons(tmp_path):
    (tmp_path / "a.txt").write_text("1 0.1 0.25 0.5 0.25 0.5 0.75\n")
    annotations, _ = read_yolo(tmp_path, ["a"], {"a": "a.png"}, lambda _: (40, 100), CLASSES)
    (picture,) = annotations.pictures
    assert picture.boxes.tolist() == [[10, 10, 50, 30]]
    assert picture.shapes == [[[10, 10, 50, 10, 50, 30]]]


@pytest.mark.parametrize("as_yolo", [False, True])
def test_m3fd_one_annotation_serves_two_pictures(tmp_path, as_yolo):
    root = write_m3fd(tmp_path, as_yolo)
    (root / "names.txt").write_text("disc\nsquare\n")
    (root / "few.txt").write_text("a\nb.png\n")
    infrared = "ir" if as_yolo else "Ir"
    options = {"class_names": "names.txt", "list_file": "few.txt"}
    visible = open_objects(str(root), "train", ObjectOptions(**options))
    assert boxes_of(visible.annotations) == some("a", "b")
    alone = open_objects(str(root), "train", ObjectOptions(**options, image_folder=infrared))
    assert int(alone.photos.load(0)[0, 0, 0]) >= 200
    pair = open_objects(str(root), "train", ObjectOptions(**options, second_images=infrared))
    assert pair.channels == 4
    image = pair.photos.load(0)
    assert int(image[0].max()) < 120 and int(image[3].min()) >= 200
    assert pair.photos.target(0).labels.tolist() == [1, 0]


def test_m3fd_needs_a_list(tmp_path):
    with pytest.raises(DataError, match="no list of the train pictures.*by train_list"):
        open_objects(str(write_m3fd(tmp_path)), "train", USUAL)


def test_places_are_options(tmp_path):
    root = write_coco(tmp_path)
    (root / "annotations").rename(root / "labels")
    options = ObjectOptions(
        annotations="labels/instances_{split}2017.json", image_folder="{split}2017"
    )
    assert boxes_of(open_objects(str(root), "val", options).annotations) == BOXES
    with pytest.raises(DataError, match="in a layout that is known"):
        open_objects(str(root), "val", USUAL)
    with pytest.raises(DataError, match="annotations 'none.json': there is no"):
        open_objects(str(root), "val", ObjectOptions(annotations="none.json"))


def test_all_forms_give_the_same_json(tmp_path):
    made = []
    for write in (write_coco, write_voc, write_yolo):
        root = tmp_path / write.__name__
        root.mkdir()
        write(root)
        content = as_coco(open_objects(str(root), "train", USUAL, keep_empty=False).annotations)
        names = {entry["id"]: entry["name"] for entry in content["categories"]}
        stems = {
            entry["id"]: entry["file_name"].rpartition(".")[0].removeprefix("train-")
            for entry in content["images"]
        }
        made.append(
            {
                (stems[e["image_id"]], names[e["category_id"]], tuple(map(round, e["bbox"])))
                for e in content["annotations"]
                if stems[e["image_id"]] in "ab"
            }
        )
    assert made[0] == made[1] == made[2]
    assert len(made[0]) == 3


def test_coco_goes_round(tmp_path):
    content = coco_json()
    lengths = [SIZE[0] * 10, SIZE[0] * 5, SIZE[0] * 45]
    content["annotations"][0] |= {
        "segmentation": {"size": list(SIZE), "counts": lengths},
        "iscrowd": 1,
    }
    code = coco_masks.encode(np.asfortranarray(np.ones(SIZE, dtype=np.uint8)))
    content["annotations"][2]["segmentation"] = {
        "size": list(SIZE),
        "counts": code["counts"].decode(),
    }
    file, again = tmp_path / "a.json", tmp_path / "b.json"
    file.write_text(json.dumps(content))
    annotations = read_coco(file)
    assert annotations.crowds == 1
    assert annotations.pictures[0].crowd.tolist() == [True, False]
    again.write_text(json.dumps(as_coco(annotations)))
    assert as_coco(read_coco(again)) == as_coco(annotations)
    assert as_coco(annotations)["annotations"] == content["annotations"]


# -- repaired and counted -------------------------------------------------------------------------


def read(tmp_path, **changes: Any) -> Any:
    """Annotations whose first object is changed."""
    content = coco_json()
    content["annotations"][0] |= changes
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps(content))
    return read_coco(file)


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ([4, 6, 0, 10], "with an empty box"),
        ([4, 6, -3, 10], "with an inverted box"),
        ([70, 6, 5, 10], "with a box outside the picture"),
        ([4, 6, float("nan"), 10], "with a box that is not finite"),
    ],
)
def test_unusable_boxes_are_dropped_and_counted(tmp_path, box, reason):
    annotations = read(tmp_path, bbox=box)
    assert annotations.dropped.counts == {reason: 1}
    assert len(annotations.pictures[0]) == 1
    (line,) = annotations.told()
    assert f"1 object of {tmp_path / 'annotations.json'} is left out: 1 {reason}" in line
    assert "a.png (annotation 1)" in line


def test_boxes_beyond_the_picture_are_cut_off_and_counted(tmp_path):
    annotations = read(tmp_path, bbox=[-5, 6, 20, 100])
    assert annotations.pictures[0].boxes[0].tolist() == [0, 6, 15, SIZE[0]]
    assert annotations.dropped.total == 0
    assert "1 object" in annotations.told()[0] and "cut off" in annotations.told()[0]
    rounded = read(tmp_path, bbox=[-0.4, 6, 20, 42.3])
    assert rounded.told() == []


def test_polygons_without_area_are_dropped(tmp_path):
    annotations = read(tmp_path, segmentation=[[1, 2, 3, 4]])
    assert annotations.dropped.counts == {"with polygons of fewer than three points": 1}
    kept = read(tmp_path, segmentation=[[1, 2, 3, 4], [4, 6, 20, 6, 20, 20]])
    assert kept.dropped.total == 0
    assert kept.pictures[0].shapes[0] == [[4, 6, 20, 6, 20, 20]]


def test_objects_without_masks_are_left_out_of_masks(tmp_path):
    content = coco_json()
    del content["annotations"][0]["segmentation"]
    root = write_coco(tmp_path)
    (root / "annotations" / "instances_train2017.json").write_text(
        json.dumps(content).replace('"file_name": "', '"file_name": "train-')
    )
    boxes = open_objects(str(root), "train", USUAL, masks=False)
    masks = open_objects(str(root), "train", USUAL, masks=True)
    assert boxes.annotations.objects == masks.annotations.objects + 1
    assert masks.annotations.dropped.counts == {"without a mask": 1}


def test_difficult_objects_of_voc_are_crowds(tmp_path):
    (tmp_path / "a.xml").write_text(
        voc_xml([("disc", (1, 2, 30, 40)), ("disc", (1, 1, 9, 9), True)])
    )
    annotations, _ = read_voc(tmp_path, ["a"], {"a": "a.jpg"}, lambda _: SIZE)
    assert annotations.pictures[0].crowd.tolist() == [False, True]
    assert annotations.crowds == 1


def test_voc_sizes_come_from_pictures_where_files_say_none(tmp_path):
    (tmp_path / "a.xml").write_text(voc_xml([("disc", (1, 2, 300, 40))], size=None))
    (tmp_path / "b.xml").write_text(voc_xml([("disc", (1, 2, 300, 40))], size=(0, 0)))
    pictures = {"a": "a.jpg", "b": "b.jpg"}
    annotations, _ = read_voc(tmp_path, ["a", "b"], pictures, lambda _: (50, 320))
    assert [picture.size for picture in annotations.pictures] == [(50, 320)] * 2


# -- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_id": 77}, "1 has an image_id that none of the 4 images has: annotation 1: 77"),
        ({"category_id": 4}, "1 has a category_id that none of the 2 categories has .*'disc'"),
        ({"id": 2}, r"1 ids of annotations are used more than once \(2\)"),
        ({"bbox": [1, 2, 3]}, "has no bbox of four numbers"),
        (
            {"segmentation": {"size": [10, 10], "counts": [100]}},
            "has a mask of another size than its picture: a.png",
        ),
        (
            {"segmentation": {"size": list(SIZE), "counts": [100]}},
            "code is of another number of pixels",
        ),
        ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "no pairs of finite numbers"),
    ],
)
def test_coco_refusals(tmp_path, changes, message):
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, **changes)
    assert "annotations.json" in str(caught.value)


def test_ids_of_images_and_categories_are_unique(tmp_path):
    for name in ("images", "categories"):
        content = coco_json()
        content[name][1]["id"] = content[name][0]["id"]
        file = tmp_path / "annotations.json"
        file.write_text(json.dumps(content))
        with pytest.raises(DataError, match=f"1 ids of {name} are used more than once"):
            read_coco(file)


def test_files_that_are_no_annotations(tmp_path):
    file = tmp_path / "annotations.json"
    for text, message in (
        ("{", "is no JSON"),
        ("{}", "has no list 'images'"),
        ('[{"image_id": 1, "score": 0.5}]', "holds results of a detector"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=message):
            read_coco(file)


def test_missing_pictures(tmp_path):
    root = write_coco(tmp_path)
    (root / "train2017" / "train-b.png").unlink()
    with pytest.raises(DataError, match="1 of 4 annotated pictures cannot be read .*train-b.png"):
        open_objects(str(root), "train", USUAL)
    source = open_objects(str(root), "train", USUAL, max_unreadable=0.3)
    assert boxes_of(source.annotations) == some("a", "c", "d")
    assert any("train-b.png: there is no picture" in note for note in source.notes)


def test_pictures_that_no_annotation_names_are_told(tmp_path):
    def told(root):
        notes = open_objects(str(root), "train", USUAL).notes
        return [note for note in notes if "named by no annotation" in note]

    coco = write_coco(tmp_path / "coco")
    assert told(coco) == []
    write_picture(coco / "train2017" / "aa.png")
    (note,) = told(coco)
    assert note.startswith("1 of 5 pictures in ") and note.endswith("not used, aa.png first")
    # A list, or the other split, may have the rest of a folder.
    assert told(write_voc(tmp_path / "voc")) == []
    for picture in (coco / "val2017").iterdir():
        picture.rename(coco / "train2017" / picture.name)
    (coco / "train2017").rename(coco / "images")
    places = ObjectOptions(
        annotations="annotations/instances_{split}2017.json", image_folder="images"
    )
    notes = open_objects(str(coco), "train", places).notes
    assert not any("named by no annotation" in note for note in notes)


def test_pictures_of_another_size(tmp_path):
    content = coco_json()
    content["images"][2] |= {"height": SIZE[1], "width": SIZE[0]}
    content["annotations"] = content["annotations"][:3]
    root = write_coco(tmp_path, **content)
    with pytest.raises(DataError, match="1 of 4 pictures have another size .*48 x 60.*60 x 48"):
        open_objects(str(root), "val", USUAL)


def test_voc_refusals(tmp_path):
    (tmp_path / "a.xml").write_text(voc_xml([("cat", (1, 2, 30, 40))]))
    (tmp_path / "b.xml").write_text("<annotation><object><name>disc</name></object></annotation>")
    pictures = {"a": "a.jpg", "b": "b.jpg"}
    with pytest.raises(DataError, match="a class that the 2 names have not .*a.jpg: 'cat'"):
        read_voc(tmp_path, ["a"], pictures, lambda _: SIZE, CLASSES)
    with pytest.raises(DataError, match="1 of 2 files cannot be used.*b.xml.*without xmin"):
        read_voc(tmp_path, ["a", "b"], pictures, lambda _: SIZE)
    with pytest.raises(DataError, match="missing.xml"):
        read_voc(tmp_path, ["missing"], {"missing": "missing.jpg"}, lambda _: SIZE)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 0.5 0.5 0.1 0.1", "a class number that is not below the 2 classes.*class 2"),
        ("0 30 20 10 10", "in shares of the picture .*line 1: '0 30 20 10 10'"),
        ("0 0.5 0.5", "lines are neither"),
        ("disc 0.5 0.5 0.1 0.1", "lines are neither"),
    ],
)
def test_yolo_refusals(tmp_path, line, message):
    (tmp_path / "a.txt").write_text(f"{line}\n{yolo_text(BOXES['b'])}")
    with pytest.raises(DataError, match=message):
        read_yolo(tmp_path, ["a"], {"a": "a.png"}, lambda _: SIZE, CLASSES)


def test_yolo_needs_names(tmp_path):
    root = write_yolo(tmp_path)
    (root / "data.yaml").unlink()
    with pytest.raises(DataError, match="without their names; give a file .* class_names"):
        open_objects(str(root), "train", USUAL)


def test_names_of_classes_differ(tmp_path):
    root = write_yolo(tmp_path, "names: [disc, disc]")
    with pytest.raises(DataError, match="classes 0 and 1 have the same name, 'disc'"):
        open_objects(str(root), "train", USUAL)


def test_two_pictures_for_one_file(tmp_path):
    root = write_yolo(tmp_path)
    picture = root / "images" / "train" / "a.png"
    picture.with_suffix(".jpg").write_bytes(picture.read_bytes())
    with pytest.raises(DataError, match="differ from another by their ending alone .*a.jpg"):
        open_objects(str(root), "train", USUAL)


def test_a_changed_box_is_another_data_set(tmp_path):
    root = write_coco(tmp_path)
    before = open_objects(str(root), "train", USUAL).fingerprint()
    assert open_objects(str(root), "train", USUAL).fingerprint() == before
    file = root / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"][0] += 1
    file.write_text(json.dumps(content))
    changed = open_objects(str(root), "train", USUAL).fingerprint()
    assert "instances_train2017.json" in str(changed.changes_since(before))
