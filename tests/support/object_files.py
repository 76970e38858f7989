"""Small data sets of pictures with objects, in each of the forms that annotations come in."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from pathlib import Path

CLASSES = ("disc", "square")
# left, top, right, bottom in pixels, of pictures of 48 x 60
BOXES = {
    "a": [("square", (4, 6, 24, 30)), ("disc", (30, 10, 54, 34))],
    "b": [("disc", (2, 2, 40, 40))],
    "c": [("square", (10, 20, 50, 44))],
    "d": [],
}
SIZE = (48, 60)


def write_picture(
    path: Path, size: tuple[int, int] = SIZE, value: int = 90, mode: str = "RGB"
) -> None:
    """A picture of one colour with a little noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(path.name.encode())
    noise = np.random.default_rng(seed).integers(0, 20, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise + np.uint8(value)).save(path)


def coco_json(boxes: dict[str, Any] = BOXES, ids: tuple[int, ...] = (3, 90)) -> dict[str, Any]:
    """COCO's annotations of boxes, each with a polygon; ids of categories have a gap."""
    images, annotations = [], []
    for number, (stem, objects) in enumerate(boxes.items(), start=1):
        images.append(
            {"id": number, "file_name": f"{stem}.png", "height": SIZE[0], "width": SIZE[1]}
        )
        for name, (left, top, right, bottom) in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": ids[CLASSES.index(name)],
                    "bbox": [left, top, right - left, bottom - top],
                    "area": (right - left) * (bottom - top),
                    "iscrowd": 0,
                    "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
                }
            )
    categories = [{"id": number, "name": name} for number, name in zip(ids, CLASSES)]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_coco(root: Path, **of_val: Any) -> Path:
    """A folder in COCO's layout; train and val have the same pictures under other names."""
    for split in ("train", "val"):
        content = coco_json()
        if split == "val":
            content |= of_val
        for image in content["images"]:
            image["file_name"] = f"{split}-{image['file_name']}"
            write_picture(root / f"{split}2017" / image["file_name"])
        file = root / "annotations" / f"instances_{split}2017.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content))
    return root


def voc_xml(objects: Any, size: tuple[int, int] | None = SIZE, filename: str = "wrong.jpg") -> str:
    """An XML file of Pascal VOC: corners count from 1 and are included."""
    parts = [f"<annotation><filename>{filename}</filename>"]
    if size is not None:
        parts.append(f"<size><width>{size[1]}</width><height>{size[0]}</height></size>")
    for name, (left, top, right, bottom), *difficult in objects:
        parts.append(
            f"<object><name>{name}</name><difficult>{int(bool(difficult))}</difficult><bndbox>"
            f"<xmin>{left + 1}</xmin><ymin>{top + 1}</ymin><xmax>{right}</xmax>"
            f"<ymax>{bottom}</ymax></bndbox></object>"
        )
    return "".join([*parts, "</annotation>"])


def yolo_text(objects: Any, size: tuple[int, int] = SIZE) -> str:
    """A text file of YOLO: class, centre and sides, as shares of the picture."""
    lines = []
    for name, (left, top, right, bottom) in objects:
        numbers = (
            (left + right) / 2 / size[1],
            (top + bottom) / 2 / size[0],
            (right - left) / size[1],
            (bottom - top) / size[0],
        )
        lines.append(f"{CLASSES.index(name)} " + " ".join(f"{number:.8f}" for number in numbers))
    return "\n".join(lines) + "\n"


def write_lists(folder: Path) -> None:
    """Lists of names: a and b to train, the others to evaluate."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.txt").write_text("a\nb\n")
    (folder / "val.txt").write_text("c\nd\n")


def write_voc(root: Path) -> Path:
    """A folder in Pascal VOC's layout."""
    for stem, objects in BOXES.items():
        write_picture(root / "JPEGImages" / f"{stem}.jpg")
        (root / "Annotations").mkdir(exist_ok=True)
        (root / "Annotations" / f"{stem}.xml").write_text(voc_xml(objects))
    write_lists(root / "ImageSets" / "Main")
    return root


def write_m3fd(root: Path, as_yolo: bool = False) -> Path:
    """A folder in one of M3FD's layouts: a visible and an infrared picture for each annotation."""
    visible, infrared, labels = ("vi", "ir", "labels") if as_yolo else ("Vis", "Ir", "Annotation")
    for stem, objects in BOXES.items():
        write_picture(root / visible / f"{stem}.png", value=90)
        write_picture(root / infrared / f"{stem}.png", value=200)
        (root / labels).mkdir(exist_ok=True)
        if as_yolo:
            (root / labels / f"{stem}.txt").write_text(yolo_text(objects))
        else:
            (root / labels / f"{stem}.xml").write_text(voc_xml(objects))
    if as_yolo:
        write_lists(root / "meta")
    return root


def write_yolo(root: Path, names: str = "names: {0: disc, 1: square}") -> Path:
    """A folder of Ultralytics' YOLO: data.yaml, images and labels."""
    for stem, objects in BOXES.items():
        split = "train" if stem in "ab" else "val"
        write_picture(root / "images" / split / f"{stem}.png")
        file = root / "labels" / split / f"{stem}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        if objects:
            file.write_text(yolo_text(objects))
    (root / "data.yaml").write_text(f"path: .\ntrain: images/train\nval: images/val\n{names}\n")
    return root


@dataclass
class Shapes:
    """Made pictures: bright discs and squares on a dark ground."""

    count: int
    side: int = 64
    channels: int = 3
    dtype: Any = np.uint8
    seed: int = 0

    def write(self, folder: Path, json_file: Path) -> None:
        """Writes the pictures (TIFF where they are no RGB) and COCO's annotations of them."""
        generator = np.random.default_rng(self.seed)
        images, annotations = [], []
        folder.mkdir(parents=True, exist_ok=True)
        json_file.parent.mkdir(parents=True, exist_ok=True)
        scale = 255 if self.dtype == np.uint8 else 65535
        for number in range(1, self.count + 1):
            picture = generator.uniform(0, 0.3, (self.channels, self.side, self.side))
            for _ in range(int(generator.integers(1, 3))):
                label, mask = self._object(generator)
                picture[:, mask] = generator.uniform(0.7, 1.0) if label else 0.5
                annotations.append(self._entry(len(annotations) + 1, number, label, mask))
            plain = self.channels == 3 and self.dtype == np.uint8
            name = f"{number:03}.{'png' if plain else 'tif'}"
            self._save(folder / name, (picture * scale).astype(self.dtype), plain)
            images.append(
                {"id": number, "file_name": name, "height": self.side, "width": self.side}
            )
        categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        json_file.write_text(json.dumps(content))

    def _object(self, generator: np.random.Generator) -> tuple[int, np.ndarray]:
        label = int(generator.integers(2))
        radius = int(generator.integers(self.side // 8, self.side // 4))
        x, y = generator.integers(radius, self.side - radius, 2)
        rows, columns = np.mgrid[: self.side, : self.side]
        if label:
            return label, (abs(rows - y) < radius) & (abs(columns - x) < radius)
        return label, (rows - y) ** 2 + (columns - x) ** 2 < radius**2

    @staticmethod
    def _entry(number: int, image: int, label: int, mask: np.ndarray) -> dict[str, Any]:
        rows, columns = np.nonzero(mask)
        left, top = int(columns.min()), int(rows.min())
        box = [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top]
        flat = mask.T.ravel().astype(np.int8)  # column by column, as COCO's codes go
        changes = np.flatnonzero(np.diff(np.concatenate([[0], flat, [2]])))
        lengths = np.diff(np.concatenate([[0], changes])).tolist()
        return {
            "id": number,
            "image_id": image,
            "category_id": label + 1,
            "bbox": box,
            "area": int(mask.sum()),
            "iscrowd": 0,
            "segmentation": {"size": list(mask.shape), "counts": lengths},
        }

    @staticmethod
    def _save(path: Path, picture: np.ndarray, plain: bool) -> None:
        if plain:
            Image.fromarray(np.moveaxis(picture, 0, -1)).save(path)
            return
        import tifffile

        bands = {"planarconfig": "separate"} if len(picture) > 1 else {}
        values = picture if bands else picture[0]
        tifffile.imwrite(path, values, photometric="minisblack", **bands)


def write_shapes(root: Path, train: int = 8, val: int = 4, **kind: Any) -> Path:
    """A data set of made pictures in COCO's layout."""
    for number, (split, count) in enumerate((("train", train), ("val", val))):
        shapes = Shapes(count, seed=number, **kind)
        shapes.write(root / split, root / "annotations" / f"instances_{split}.json")
    return root
