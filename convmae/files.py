"""Files that are written whole or not at all, and the folder that is replaced as one."""

from __future__ import annotations

import os
import stat
from contextlib import contextmanager
from hashlib import sha256
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CHECKPOINT = "checkpoint"  # the folder of a checkpoint, in the folder of its run


def replaced_folder(folder: Path) -> Path:
    """What a folder is called while a new one takes its place."""
    return folder.with_name(f".{folder.name}.old")


def why_no_folder(path: Path) -> str | None:
    """Why there can be no folder to write in at `path`, in words; None where it may be.

    Nothing is tried: the system may still refuse.
    """
    for part in (path, *path.parents):
        try:
            mode = os.lstat(part).st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:  # a name too long, for example
            return f"{error.strerror or error}: {str(part)!r}"
        except ValueError as error:  # a zero byte
            return f"{error}: {str(part)!r}"
        if stat.S_ISLNK(mode) and not part.exists():
            return f"{str(part)!r} is a link to {os.readlink(part)!r}, which does not exist"
        if not part.is_dir():
            return f"{str(part)!r} is a file, not a folder"
        if hasattr(os, "statvfs") and os.statvfs(part).f_flag & os.ST_RDONLY:
            return f"{str(part)!r} is on a file system that can be read only"
        if not os.access(part, os.W_OK | os.X_OK):
            return f"no permission in {str(part)!r}"
        return None
    return f"no part of {str(path)!r} exists"


_DIGEST_BELOW = "# Written by convmae; the last line is the digest of all before it.\n"
_DIGEST = "# sha256:"


def with_digest_line(text: str) -> str:
    """A text file, such as YAML, between two comments by which a change is noticed."""
    text = _DIGEST_BELOW + text
    return f"{text}{_DIGEST}{sha256(text.encode()).hexdigest()}\n"


def was_changed(text: str) -> bool:
    """Whether a text that `with_digest_line` made is another now; False of other texts."""
    text = text.replace("\r\n", "\n")  # as some editors and systems end lines
    body, mark, digest = text.rpartition(_DIGEST)
    if not mark:
        return text.startswith(_DIGEST_BELOW)
    return sha256(body.encode()).hexdigest() != digest.removesuffix("\n")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The name of a file to write beside `path`; it then takes the place of `path`, flushed.

    Where writing it fails it is deleted, and `path` stays as it was.
    """
    fresh = path.with_name(f".new.{path.name}")
    try:
        yield fresh
        flush(fresh)
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """`fsync`, of a folder too where the system can open one."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
