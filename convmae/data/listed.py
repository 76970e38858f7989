"""Pictures and shards that are named one by one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from convmae.data.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

LIST_EXTENSION = ".txt"  # of a file with the path of a picture in each line


def one_pattern(names: Sequence[str]) -> str:
    """A pattern of shards that stands for these names, as a shell makes them of `*.tar`."""
    special = next((name for name in names if set(name) & set("{},\\")), None)
    if special is not None:
        raise DataError(
            f"--data_path {special!r}: shards that are named one by one have no braces, commas or "
            "backslashes in their names; give their folder"
        )
    return "{" + ",".join(names) + "}"


def listed_paths(file: Path) -> list[Path]:
    """The paths in the lines of a text file.

    A file that does not exist is a picture that cannot be read, if others do.

    Raises:
        DataError: it is no text, has no path, or none that exists.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--data_path {str(file)!r} is no list of paths: {error}") from error
    paths = [file.parent / Path(line.strip()).expanduser() for line in lines if line.strip()]
    if not paths:
        raise DataError(f"--data_path {str(file)!r} names no file; expected a path in each line")
    if not any(path.is_file() for path in paths):
        raise DataError(
            f"--data_path {str(file)!r}: none of the {len(paths)} files that it names exists, the "
            f"first is {paths[0]}; relative paths begin at the folder of the list"
        )
    return paths
