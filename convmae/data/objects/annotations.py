"""The one form that annotations of objects are read into, and the checks that all of them pass."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from convmae.data.classes import listed, name_problem
from convmae.data.errors import DataError
from convmae.data.left_out import LeftOut
from convmae.data.objects.shapes import shape_area, shape_problem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convmae.data.crops import Size

SMALLEST = 1e-5  # pixels: a box that is not wider and higher is empty, as in detectron2
NAMED_AT_MOST = 5  # in a message


@dataclass(frozen=True)
class FoundObject:
    """One object as a file tells it, before it is checked.

    Attributes:
        label: number of its class, from 0.
        box: left, top, right, bottom in pixels; 0 is the left or upper edge of the first pixel.
        shape: polygons, or a run-length code of its pixels (COCO's forms); None of a box alone.
        crowd: whether it is a group that is neither learned nor counted as missed.
        area: in pixels, as the file says it; None if it does not.
        where: what to call it in messages.
    """

    label: int
    box: tuple[float, float, float, float]
    shape: Any = None
    crowd: bool = False
    area: float | None = None
    where: str = ""


@dataclass
class ObjectPicture:
    """A picture and its objects.

    Attributes:
        name: of the file, below the folder of the pictures.
        size: height and width in pixels.
        number: what results call the picture: COCO's image id.
        boxes: `[n, 4]` float64, left, top, right, bottom in pixels.
        labels: `[n]` int64, numbers of classes from 0.
        crowd: `[n]` bool, groups that are neither learned nor counted as missed.
        areas: `[n]` float64, pixels.
        shapes: polygons or run-length codes, None of an object that has a box alone.
    """

    name: str
    size: Size
    number: int
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    shapes: list[Any]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def learned(self) -> int:
        """How many objects there are to learn from: those that are no groups."""
        return int((~self.crowd).sum())

    def only(self, kept: np.ndarray) -> ObjectPicture:
        """The same picture with some of its objects, chosen by bool `[n]`."""
        return ObjectPicture(
            self.name,
            self.size,
            self.number,
            self.boxes[kept],
            self.labels[kept],
            self.crowd[kept],
            self.areas[kept],
            [shape for shape, keep in zip(self.shapes, kept) if keep],
        )


@dataclass
class Annotations:
    """The objects of a data set, checked.

    Attributes:
        where: the file or folder that they were read from.
        classes: names, in the order of the labels.
        category_ids: COCO's number of each class, in results.
        pictures: with their objects.
        dropped: objects that cannot be used, counted.
        clipped: boxes that reach beyond their picture and were cut off there, counted.
        crowds: groups, and objects marked as difficult.
        notes: what else there is to tell.
    """

    where: str
    classes: list[str]
    category_ids: list[int]
    pictures: list[ObjectPicture]
    dropped: LeftOut
    clipped: LeftOut
    crowds: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def objects(self) -> int:
        """How many objects there are, groups included."""
        return sum(map(len, self.pictures))

    @property
    def has_masks(self) -> bool:
        """Whether some object has a shape."""
        return any(shape is not None for picture in self.pictures for shape in picture.shapes)

    def told(self) -> list[str]:
        """What to tell of these annotations, a line each."""
        lines = [str(count) for count in (self.dropped, self.clipped) if count.total]
        if self.crowds:
            lines.append(
                f"{self.crowds:,} objects of {self.where} are crowds or difficult: not learned, "
                "and not counted as missed"
            )
        return [*lines, *self.notes]

    def renumber(self, numbers: Sequence[int], classes: Sequence[str]) -> None:
        """Gives the objects the labels of a model.

        Args:
            numbers: of each class of these annotations the model's number.
            classes: the model's names.
        """
        table = np.asarray(numbers, dtype=np.int64)
        for picture in self.pictures:
            picture.labels = table[picture.labels]
        ids = dict(zip(numbers, self.category_ids))
        free = iter(number for number in range(1, 10**6) if number not in set(self.category_ids))
        self.category_ids = [
            ids[place] if place in ids else next(free) for place in range(len(classes))
        ]
        self.classes = list(classes)

    def drop_without_masks(self) -> None:
        """Leaves out objects without a shape, from which no mask can be learned."""
        for place, picture in enumerate(self.pictures):
            lacking = np.array([shape is None for shape in picture.shapes], dtype=bool)
            if lacking.any():
                count = int(lacking.sum())
                self.dropped.add("without a mask", picture.name, count=count)
                self.pictures[place] = picture.only(~lacking)


class Collector:
    """Checks objects one by one, and makes `Annotations` of them.

    Boxes and shapes that cannot be used are dropped, boxes that reach beyond the picture are cut
    off there, as COCO's tools do; both are counted. What has no such way out is refused at the end,
    so that the message can tell how often it was found.

    Args:
        where: the file or folder that is read.
        classes: names of the classes, in the order of the labels.
        category_ids: COCO's number of each; 1, 2 ... if not given.
    """

    def __init__(
        self, where: str, classes: Sequence[str], category_ids: Sequence[int] | None = None
    ) -> None:
        problem = name_problem(classes) if classes else "there is no class"
        if problem is not None:
            raise DataError(f"{where}: {problem}; expected classes whose names differ")
        self.where, self.classes = where, list(classes)
        self.category_ids = list(category_ids or range(1, len(self.classes) + 1))
        self.pictures: list[ObjectPicture] = []
        self.dropped = LeftOut(f"objects of {where}")
        self.clipped = LeftOut(f"objects of {where}", done="cut off at the edge of their picture")
        self.crowds = 0
        self.notes: list[str] = []
        self._refused: dict[str, list[str]] = {}

    def refuse(self, kind: str, name: str) -> None:
        """Notes something that cannot be repaired; `finish` raises an error that tells of it.

        Args:
            kind: what is wrong, in words that are counted, and what was expected.
            name: where.
        """
        self._refused.setdefault(kind, []).append(name)

    def add(self, name: str, size: Size, number: int, found: Sequence[FoundObject]) -> None:
        """Adds a picture and what of its objects can be used."""
        kept = [made for each in found if (made := self._checked(name, size, each)) is not None]
        self.crowds += sum(each.crowd for each in kept)
        self.pictures.append(
            ObjectPicture(
                name,
                size,
                number,
                np.array([each.box for each in kept], dtype=np.float64).reshape(-1, 4),
                np.array([each.label for each in kept], dtype=np.int64),
                np.array([each.crowd for each in kept], dtype=bool),
                np.array([each.area for each in kept], dtype=np.float64),
                [each.shape for each in kept],
            )
        )

    def _checked(self, name: str, size: Size, found: FoundObject) -> FoundObject | None:
        """The object with its box inside the picture; None if it is of no use."""
        height, width = size
        where = f"{name}{found.where and f' ({found.where})'}"
        if not 0 <= found.label < len(self.classes):
            self.refuse(
                f"has a class number that is not below the {len(self.classes)} classes "
                f"({listed(self.classes)})",
                f"{where}: class {found.label}",
            )
            return None
        left, top, right, bottom = found.box
        if not all(map(math.isfinite, found.box)):
            self.dropped.add("with a box that is not finite", where)
            return None
        if right < left or bottom < top:
            self.dropped.add("with an inverted box", where)
            return None
        if right - left <= SMALLEST or bottom - top <= SMALLEST:
            self.dropped.add("with an empty box", where)
            return None
        box = (max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height)))
        if box[2] - box[0] <= SMALLEST or box[3] - box[1] <= SMALLEST:
            self.dropped.add("with a box outside the picture", where)
            return None
        # Boxes that are written with few digits end a little beyond the edge: nothing to tell of.
        if max(abs(new - old) for new, old in zip(box, found.box)) > 1:
            self.clipped.add("boxes", where)
        shape, problem = found.shape, None
        if shape is not None:
            shape, problem = shape_problem(shape, size)
        if problem is not None:
            self.refuse(problem, where)
        if found.shape is not None and shape is None:
            self.dropped.add("with polygons of fewer than three points", where)
            return None
        area = found.area
        if area is None:
            area = (box[2] - box[0]) * (box[3] - box[1])
            area = area if shape is None or problem is not None else shape_area(shape, size)
        return FoundObject(found.label, box, shape, found.crowd, float(area))

    def finish(self) -> Annotations:
        """The annotations.

        Raises:
            DataError: something cannot be repaired, or there is no object at all.
        """
        self.raise_refused()
        made = Annotations(
            self.where,
            self.classes,
            self.category_ids,
            self.pictures,
            self.dropped,
            self.clipped,
            self.crowds,
            self.notes,
        )
        if not made.objects:
            left = f" ({self.dropped})" if self.dropped.total else ""
            raise DataError(
                f"{self.where} has no object in {len(self.pictures)} pictures{left}; expected "
                "boxes to learn from or to compare with"
            )
        return made

    def raise_refused(self) -> None:
        """Raises `DataError` where something was refused."""
        if not self._refused:
            return
        parts = []
        for kind, names in self._refused.items():
            more = f" and {len(names) - NAMED_AT_MOST:,} more" if len(names) > NAMED_AT_MOST else ""
            parts.append(f"{len(names):,} {kind}: {'; '.join(names[:NAMED_AT_MOST])}{more}")
        raise DataError(f"{self.where} cannot be used: {'. '.join(parts)}")
