"""YOLO's text files, one for each picture: `class x y width height`, shares of the picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from convmae.data.errors import Failure, UnreadableError
from convmae.data.objects.annotations import Collector, FoundObject

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from convmae.data.crops import Size
    from convmae.data.objects.annotations import Annotations

BOX_NUMBERS = 5
FEWEST_OF_POLYGON = 7  # a class and three points


def read_yolo(
    folder: Path,
    stems: Sequence[str],
    pictures: dict[str, str],
    size_of: Callable[[str], Size],
    classes: Sequence[str],
) -> tuple[Annotations, list[Failure]]:
    """The annotations of a folder of text files.

    A line is `class x y width height`, the centre and the sides of a box, or
    `class x y x y x y ...`, a polygon; all as shares of the picture's width and height. A picture
    without a file has no objects.

    Args:
        folder: of the text files.
        stems: names of the pictures to read, without ending.
        pictures: names of the pictures by their names without ending.
        size_of: height and width of a picture.
        classes: names of the classes, in the order of their numbers.

    Returns:
        The annotations, and what has no picture, or none that can be read.

    Raises:
        DataError: a line is none of the two, or has a number that is no class.
    """
    collector = Collector(str(folder), classes)
    missing: list[Failure] = []
    without = 0
    for number, stem in enumerate(stems, start=1):
        file = folder / f"{stem}.txt"
        if stem not in pictures:
            missing.append(Failure(str(file), "there is no picture of this name"))
            continue
        try:
            size = size_of(pictures[stem])
        except UnreadableError as error:
            missing.append(Failure(pictures[stem], str(error)))
            continue
        lines: list[str] = []
        if file.is_file():
            lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        else:
            without += 1
        objects = []
        for place, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            found = _object(line.split(), size, f"line {place}")
            if found is None:
                collector.refuse(
                    "lines are neither `class x y width height` nor a polygon, in shares of the "
                    "picture from 0 to 1",
                    f"{file}, line {place}: {line.strip()[:60]!r}",
                )
            else:
                objects.append(found)
        collector.add(pictures[stem], size, number, objects)
    if without:
        collector.notes.append(f"{without:,} pictures have no file in {folder}: no objects in them")
    return collector.finish(), missing


def _object(words: list[str], size: Size, where: str) -> FoundObject | None:
    """The object of a line; None if it is none."""
    try:
        label, *values = (float(word) for word in words)
    except ValueError:
        return None
    if not label.is_integer():
        return None
    height, width = size
    if len(words) == BOX_NUMBERS:
        if max(values) > 2:  # pixels, not shares: even clipped boxes do not go so far
            return None
        x, y, w, h = values[0] * width, values[1] * height, values[2] * width, values[3] * height
        return FoundObject(int(label), (x - w / 2, y - h / 2, x + w / 2, y + h / 2), where=where)
    if len(words) < FEWEST_OF_POLYGON or len(words) % 2 == 0 or max(values) > 2:
        return None
    across = [value * width for value in values[::2]]
    down = [value * height for value in values[1::2]]
    polygon = [number for point in zip(across, down) for number in point]
    box = (min(across), min(down), max(across), max(down))
    return FoundObject(int(label), box, [polygon], where=where)
