"""Which pictures of one tree of folders are read: those that a list names, or a share of them."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from convmae.data.classes import listed, normal_form, shown
from convmae.data.errors import DataError
from convmae.data.left_out import LeftOut
from convmae.seeds import Stream, derive_seed

if TYPE_CHECKING:
    from convmae.config.data import PictureChoice
    from convmae.data.source import PhotoSource

NAMED_AT_MOST = 3  # names in a message


def choose_pictures(
    paths: list[Path], here: Path, choice: PictureChoice, max_unreadable: float, left_out: LeftOut
) -> tuple[list[Path], list[LeftOut]]:
    """Those of `paths` that are to be read, in the same order.

    Args:
        paths: all pictures in the folder `here`.
        here: what paths in a list begin from.
        choice: which of them.
        max_unreadable: share of the names in a list that may be of no picture.
        left_out: counts the other pictures.

    Returns:
        The pictures, and what is left out besides them.

    Raises:
        DataError: a list that cannot be read or names none; a name of several pictures, or of too
            few; nothing is left.
    """
    beside: list[LeftOut] = []
    names = {path: normal_form(path.relative_to(here).as_posix()) for path in paths}
    chosen = set(paths)
    if choice.file is not None:
        chosen, missing = _listed(names, here, choice, max_unreadable)
        beside += [missing] if missing.total else []
        _count(left_out, f"not in {Path(choice.file).name}", names, set(paths) - chosen)
    if choice.val_share:
        held_out = _held_out({path: names[path] for path in chosen}, choice)
        kept = held_out if choice.held_out else chosen - held_out
        purpose = "training" if choice.held_out else "evaluation"
        _count(left_out, f"for {purpose} (--val_share)", names, chosen - kept)
        if not kept:
            raise DataError(
                f"--val_share {choice.val_share:g} leaves no picture of the {len(chosen)} in "
                f"{here} for {'evaluation' if choice.held_out else 'training'}; every class needs "
                "two at least"
            )
        chosen = kept
    return [path for path in paths if path in chosen], beside


def _count(left_out: LeftOut, kind: str, names: dict[Path, str], paths: set[Path]) -> None:
    if paths:
        left_out.add(kind, *(names[path] for path in paths), count=len(paths))


def _listed(
    names: dict[Path, str], here: Path, choice: PictureChoice, max_unreadable: float
) -> tuple[set[Path], LeftOut]:
    """The pictures that a list names, and names that are of none or there twice."""
    assert choice.file is not None
    file = Path(choice.file).expanduser()
    if not file.exists() and (here / file).exists():
        file = here / file
    said = f"--{choice.option} {choice.file!r}"
    lines = _lines(file, said)
    known: dict[str, set[Path]] = {}
    for path, name in names.items():
        for key in _keys(name):
            known.setdefault(key, set()).add(path)
    chosen: set[Path] = set()
    missing, seen = [], set()
    left_out = LeftOut(f"lines of {file.name}")
    for line in lines:
        if line in seen:
            left_out.add("there twice", line)
            continue
        seen.add(line)
        found = known.get(line, set())
        if len(found) > 1:
            first = " and ".join(sorted(names[path] for path in found)[:2])
            raise DataError(
                f"{said}: {shown(line)} is the name of {len(found)} pictures in {here}: {first}; "
                "expected names of one each: write the folder, and the ending, too"
            )
        if not found:
            missing.append(line)
        chosen |= found
    if missing:
        left_out.add("of no picture", *missing, count=len(missing))
    if not chosen or len(missing) > max_unreadable * len(seen):
        example = next(iter(names.values()))
        limit = f"; --max_unreadable {max_unreadable:g} is the share that may be missing"
        raise DataError(
            f"{said}: {len(seen) - len(missing)} of the {len(seen)} names are those of pictures in "
            f"{here}, missing are {listed(missing, NAMED_AT_MOST)}; names there are like "
            f"{shown(example)}{limit if chosen else ''}"
        )
    return chosen, left_out


def _lines(file: Path, said: str) -> list[str]:
    """The names in a list, as they are compared."""
    try:
        text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise DataError(f"{said} is no list of names: {error}") from error
    lines = [line.strip().removeprefix("./") for line in text.splitlines()]
    lines = [normal_form(line) for line in lines if line]
    if not lines:
        raise DataError(f"{said} names no picture; expected a name in each line")
    return lines


def _keys(name: str) -> set[str]:
    """What a list may call a picture: its path in the folder or its name, with its ending or not"""
    path = PurePosixPath(name)
    return {name, path.name, path.with_suffix("").as_posix(), path.stem}


def _held_out(names: dict[Path, str], choice: PictureChoice) -> set[Path]:
    """A share of the pictures of each class folder, the same on every machine.

    At least one of each class, and not all: of a class of one picture none.
    """
    classes: dict[str, list[Path]] = {}
    for path, name in names.items():
        classes.setdefault(name.partition("/")[0] if "/" in name else "", []).append(path)
    held_out: set[Path] = set()
    for of_class in classes.values():
        count = min(max(1, round(choice.val_share * len(of_class))), len(of_class) - 1)
        held_out.update(sorted(of_class, key=lambda path: _place(names[path], choice.seed))[:count])
    return held_out


def _place(name: str, seed: int) -> tuple[int, str]:
    """A random number of a picture, which no other picture changes."""
    digest = blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()
    key = int.from_bytes(digest, "big")
    return derive_seed(seed, Stream.CHOICE, key), name


def in_both(one: PhotoSource, other: PhotoSource) -> list[str]:
    """The files of pictures that two sources have, sorted."""
    names = [{s.photos.name(place) for place in range(s.pictures)} for s in (one, other)]
    return sorted(names[0] & names[1])
