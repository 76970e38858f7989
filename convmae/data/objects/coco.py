"""COCO's JSON: read into annotations, and written from them."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from convmae.data.classes import listed
from convmae.data.errors import DataError
from convmae.data.objects.annotations import Collector, FoundObject

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from convmae.data.objects.annotations import Annotations

LISTS = ("images", "annotations", "categories")


def read_coco(file: Path) -> Annotations:
    """The annotations of a COCO JSON file; classes in the order of their ids, which may have gaps.

    Crowds are kept as such. Boxes are `[left, top, width, height]` in pixels.

    Raises:
        DataError: it is no such file, an id is used twice or refers to nothing, or a mask is of
            another size than its picture.
    """
    content = _content(file)
    where = str(file)
    categories = sorted(content["categories"], key=lambda entry: _whole(entry, "id", where))
    _check_unique([entry["id"] for entry in categories], "categories", where)
    names = [str(entry.get("name", "")) for entry in categories]
    ids = [entry["id"] for entry in categories]
    place = {number: label for label, number in enumerate(ids)}
    collector = Collector(where, names, ids)
    images = content["images"]
    _check_unique([_whole(entry, "id", where) for entry in images], "images", where)
    of_picture: dict[int, list[FoundObject]] = {entry["id"]: [] for entry in images}
    numbers = Counter(entry.get("id") for entry in content["annotations"])
    numbers.pop(None, None)  # an annotation needs no id
    twice = [number for number, count in numbers.items() if count > 1]
    if twice:
        raise _used_twice(twice, "annotations", where)
    for entry in content["annotations"]:
        name = f"annotation {entry.get('id')}"
        if entry.get("image_id") not in of_picture:
            collector.refuse(
                f"has an image_id that none of the {len(images):,} images has",
                f"{name}: {entry.get('image_id')!r}",
            )
        elif entry.get("category_id") not in place:
            collector.refuse(
                f"has a category_id that none of the {len(ids)} categories has ({listed(names)})",
                f"{name}: {entry.get('category_id')!r}",
            )
        else:
            found = _object(entry, place, name, collector)
            if found is not None:
                of_picture[entry["image_id"]].append(found)
    for entry in images:
        size = (_whole(entry, "height", where), _whole(entry, "width", where))
        file_name = entry.get("file_name")
        if not isinstance(file_name, str) or not file_name:
            collector.refuse("has no file_name", f"image {entry['id']}")
        elif min(size) < 1:
            collector.refuse("has no pixels", f"image {entry['id']}, {file_name}")
        else:
            collector.add(file_name, size, entry["id"], of_picture[entry["id"]])
    return collector.finish()


def _content(file: Path, names: tuple[str, ...] = LISTS) -> dict[str, Any]:
    """What the file holds, with lists of these names.

    Raises:
        DataError: it is no JSON, or has not these lists.
    """
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    except ValueError as error:
        raise DataError(f"{file} is no JSON: {error}; expected annotations as COCO has") from error
    lists = content if isinstance(content, dict) else {}
    missing = [
        name
        for name in names
        if not isinstance(lists.get(name), list)
        or not all(isinstance(entry, dict) for entry in lists[name])
    ]
    if missing:
        results = isinstance(content, list) and content and "score" in content[0]
        what = "holds results of a detector" if results else f"has no list {missing[0]!r}"
        raise DataError(
            f"{file} {what}; expected COCO's annotations: a JSON object with the lists "
            f"{', '.join(names)}"
        )
    return lists


def _whole(entry: dict[str, Any], key: str, where: str) -> int:
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise DataError(f"{where}: {key} must be a whole number, got {value!r} in {entry}"[:400])
    return value


def _check_unique(numbers: list[int], what: str, where: str) -> None:
    twice = [number for number, count in Counter(numbers).items() if count > 1]
    if twice:
        raise _used_twice(twice, what, where)


def _used_twice(numbers: list[Any], what: str, where: str) -> DataError:
    first = ", ".join(map(str, numbers[:5])) + (" ..." if len(numbers) > 5 else "")
    return DataError(
        f"{where}: {len(numbers):,} ids of {what} are used more than once ({first}); expected each "
        "once: give them new numbers"
    )


def _object(
    entry: dict[str, Any], place: dict[int, int], name: str, collector: Collector
) -> FoundObject | None:
    """An entry of the list of annotations; None where its box is none."""
    box = entry.get("bbox")
    try:
        left, top, width, height = (float(value) for value in box)  # type: ignore[union-attr]
    except (TypeError, ValueError):
        collector.refuse("has no bbox of four numbers", f"{name}: {box!r}")
        return None
    area = entry.get("area")
    known = isinstance(area, int | float) and not isinstance(area, bool)
    return FoundObject(
        place[entry["category_id"]],
        (left, top, left + width, top + height),
        entry.get("segmentation") or None,
        bool(entry.get("iscrowd", 0)),
        float(area) if known else None,  # type: ignore[arg-type]
        name,
    )


def read_ids(file: Path) -> tuple[dict[str, int], dict[str, int]]:
    """The ids of the images of a COCO JSON file by their file names, and those of categories.

    Raises:
        DataError: it is no such file.
    """
    content = _content(file, ("images", "categories"))
    where = str(file)
    images = {str(e.get("file_name")): _whole(e, "id", where) for e in content["images"]}
    return images, {str(e.get("name")): _whole(e, "id", where) for e in content["categories"]}


def as_coco(annotations: Annotations, chosen: Iterable[int] | None = None) -> dict[str, Any]:
    """The annotations as COCO's JSON has them: `images`, `annotations`, `categories`.

    Args:
        annotations: of any origin.
        chosen: places of the pictures to write; all if not given.
    """
    places = range(len(annotations.pictures)) if chosen is None else chosen
    pictures = [annotations.pictures[place] for place in places]
    entries: list[dict[str, Any]] = []
    for picture in pictures:
        rows = zip(picture.boxes.tolist(), picture.labels.tolist(), picture.crowd, picture.areas)
        for (box, label, crowd, area), shape in zip(rows, picture.shapes):
            left, top, right, bottom = box
            entry = {
                "id": len(entries) + 1,
                "image_id": picture.number,
                "category_id": annotations.category_ids[label],
                "bbox": [left, top, right - left, bottom - top],
                "area": float(area),
                "iscrowd": int(crowd),
            }
            entries.append(entry if shape is None else entry | {"segmentation": shape})
    return {
        "images": [
            {
                "id": picture.number,
                "file_name": picture.name,
                "height": picture.size[0],
                "width": picture.size[1],
            }
            for picture in pictures
        ],
        "annotations": entries,
        "categories": [
            {"id": number, "name": name}
            for number, name in zip(annotations.category_ids, annotations.classes)
        ],
    }
