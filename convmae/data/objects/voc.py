"""Pascal VOC's XML files, one for each picture: boxes with 1-based corners, both included."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.etree import ElementTree

from convmae.data.classes import listed, normal_form
from convmae.data.errors import DataError, Failure, UnreadableError
from convmae.data.objects.annotations import Collector, FoundObject

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from convmae.data.crops import Size
    from convmae.data.objects.annotations import Annotations

SIDES = ("height", "width")
CORNERS = ("xmin", "ymin", "xmax", "ymax")


def read_voc(
    folder: Path,
    stems: Sequence[str],
    pictures: dict[str, str],
    size_of: Callable[[str], Size],
    classes: Sequence[str] | None = None,
) -> tuple[Annotations, list[Failure]]:
    """The annotations of a folder of XML files.

    A picture belongs to a file by its name (`0001.xml`, `0001.png`): what the XML says of it is
    often wrong. Corners count from 1 and are included: left = xmin - 1, right = xmax. Objects that
    are marked as difficult are treated as crowds.

    Args:
        folder: of the XML files.
        stems: names of the files to read, without ending.
        pictures: names of the pictures by their names without ending.
        size_of: height and width of a picture, where its XML does not say it.
        classes: names of the classes; by default those that occur, sorted.

    Returns:
        The annotations, and what has no picture.

    Raises:
        DataError: a file is missing or no XML, or names a class that `classes` has not.
    """
    missing: list[Failure] = []
    read: list[tuple[str, Size, list[tuple[str, FoundObject]]]] = []
    wrong: list[str] = []
    for stem in stems:
        file = folder / f"{stem}.xml"
        if stem not in pictures:
            missing.append(Failure(str(file), "there is no picture of this name"))
            continue
        try:
            root = ElementTree.parse(file).getroot()
            size = _size(root) or size_of(pictures[stem])
            read.append((pictures[stem], size, [_object(each) for each in root.iter("object")]))
        except (ElementTree.ParseError, ValueError, OSError) as error:
            wrong.append(f"{file}: {error}")
        except UnreadableError as error:
            missing.append(Failure(pictures[stem], str(error)))
    if wrong:
        raise DataError(
            f"{folder}: {len(wrong):,} of {len(stems):,} files cannot be used; expected XML as "
            f"Pascal VOC has: {'; '.join(wrong[:5])}"
        )
    found = sorted({name for _, _, objects in read for name, _ in objects})
    if not found:
        raise DataError(f"{folder} has no object in {len(read):,} XML files; expected some")
    names = found if classes is None else list(map(normal_form, classes))
    collector = Collector(str(folder), names)
    place = {name: label for label, name in enumerate(names)}
    if classes is None:
        collector.notes.append(
            f"classes of {folder} are those that occur there, sorted: {listed(names)}; "
            "--class_names gives others"
        )
    for number, (picture, size, objects) in enumerate(read, start=1):
        for name, _ in objects:
            if name not in place:
                collector.refuse(
                    f"objects have a class that the {len(names)} names have not ({listed(names)})",
                    f"{picture}: {name!r}",
                )
        known = [
            FoundObject(place[name], each.box, None, each.crowd)
            for name, each in objects
            if name in place
        ]
        collector.add(picture, size, number, known)
    return collector.finish(), missing


def _size(root: ElementTree.Element) -> Size | None:
    """Height and width that the file says; None where it says none, or 0 as many do."""
    try:
        height, width = (int(float(root.findtext(f"size/{side}", ""))) for side in SIDES)
    except ValueError:
        return None
    return (height, width) if min(height, width) > 0 else None


def _object(element: ElementTree.Element) -> tuple[str, FoundObject]:
    """The name of the class, and the object.

    Raises:
        ValueError: it has no name, or no box of four numbers.
    """
    name = normal_form((element.findtext("name") or "").strip())
    if not name:
        raise ValueError("an object without a name")
    texts = [element.findtext(f"bndbox/{corner}") for corner in CORNERS]
    try:
        left, top, right, bottom = (float(text or "") for text in texts)
    except ValueError as error:
        raise ValueError(f"an object {name!r} without {', '.join(CORNERS)} in numbers") from error
    difficult = (element.findtext("difficult") or "0").strip() not in ("0", "")
    return name, FoundObject(0, (left - 1, top - 1, right, bottom), None, difficult)
