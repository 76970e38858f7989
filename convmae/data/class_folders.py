"""Folders that have the names of classes, and what lies beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from convmae.data.classes import normal_form

if TYPE_CHECKING:
    from pathlib import Path


def class_folders(paths: list[Path], here: Path) -> tuple[list[str], list[int]] | None:
    """The sub-folders of `here` that pictures lie in, sorted, and the number of that of each.

    They are sorted by the form of Unicode in which names are compared: on all machines alike.

    Returns:
        None where a picture lies in no sub-folder.
    """
    tops = [path.relative_to(here).parts[:-1][:1] for path in paths]
    if () in tops:
        return None
    names = sorted({name for (name,) in tops}, key=normal_form)
    number = {name: index for index, name in enumerate(names)}
    return names, [number[name] for (name,) in tops]


def why_no_classes(paths: list[Path], here: Path) -> str:
    """Why pictures of which some lie in sub-folders have no classes; empty if none does."""
    beside = [path for path in paths if path.parent == here]
    if len(beside) == len(paths):
        return ""
    return (
        f"{len(beside)} of {len(paths)} pictures lie in no class folder, the first {beside[0]}; "
        f"expected each in a sub-folder of {here} that has the name of its class"
    )


def empty_folders(here: Path, classes: list[str]) -> tuple[str, ...]:
    """The sub-folders of `here` that are none of `classes`; hidden ones are left out."""
    names = {path.name for path in here.iterdir() if path.is_dir()}
    return tuple(sorted(name for name in names - set(classes) if not name.startswith(".")))
