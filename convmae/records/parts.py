"""Rows of a table in parts, each written whole or not at all: what was computed is not lost.

A part is an `.npz` file (whose checksums are checked on reading) of batches in a row, in a folder
beside the table. A run that starts again computes the batches that no part holds. At the end the
parts are read in order, one at a time, and written as one table.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from convmae.config import MessageError, OptionError
from convmae.files import replacing

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

ABOUT = "about.json"
PART = re.compile(r"part-(\d{12})-(\d{12})\.npz")
ROWS_AT_MOST = 8192  # of a part
BYTES_AT_MOST = 32 * 2**20
MISSING = "not there"


class WriteError(MessageError, RuntimeError):
    """What was computed cannot be written; the message says where and why."""


class Rows(NamedTuple):
    """Rows in the order of the data set."""

    names: list[str]
    labels: np.ndarray
    """int64 `[N]`: the true class, -1 where it is not known."""
    reasons: list[str]
    """Why there is nothing to say of a picture; empty where there is."""
    columns: dict[str, np.ndarray]
    """`[N, ...]` each."""

    def __len__(self) -> int:
        return len(self.names)

    def cut(self, start: int, stop: int | None = None) -> Rows:
        """Rows `start` to `stop - 1`."""
        part = slice(start, stop)
        columns = {name: values[part] for name, values in self.columns.items()}
        return Rows(self.names[part], self.labels[part], self.reasons[part], columns)


def joined(many: Sequence[Rows]) -> Rows:
    """Rows one after the other."""
    return Rows(
        [name for rows in many for name in rows.names],
        np.concatenate([rows.labels for rows in many]),
        [reason for rows in many for reason in rows.reasons],
        {name: np.concatenate([r.columns[name] for r in many]) for name in many[0].columns},
    )


# -- texts in arrays ------------------------------------------------------------------------------


def _packed(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """UTF-8 of all texts in a row, and where each ends; names of files that are no UTF-8 too."""
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    ends = np.cumsum([len(each) for each in encoded], dtype=np.int64)
    return np.frombuffer(b"".join(encoded), np.uint8), ends


def _unpacked(data: np.ndarray, ends: np.ndarray) -> list[str]:
    content, limits = data.tobytes(), [0, *ends.tolist()]
    return [
        content[start:end].decode("utf-8", "surrogatepass")
        for start, end in zip(limits, limits[1:])
    ]


# -- the folder -----------------------------------------------------------------------------------


@dataclass
class Parts:
    """The parts of a table.

    Args:
        folder: where they lie.
        batches: how many there are to be.
        batch_size: rows of a batch; the last may have fewer.
    """

    folder: Path
    batches: int
    batch_size: int

    @staticmethod
    def folder_of(output: Path) -> Path:
        """Where the parts of a table lie."""
        return output.with_name(f".{output.name}.parts")

    def begin(self, about: dict[str, Any]) -> None:
        """Makes the folder.

        Raises:
            OSError: that cannot be.
        """
        self.folder.mkdir(exist_ok=True)
        with replacing(self.folder / ABOUT) as fresh:
            fresh.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    def about(self) -> dict[str, Any] | None:
        """What `begin` wrote; None if the folder is not there or cannot be understood."""
        try:
            found = json.loads((self.folder / ABOUT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def delete(self) -> None:
        """Deletes what was written here; what says of which run it is goes first."""
        (self.folder / ABOUT).unlink(missing_ok=True)
        if self.folder.is_dir():
            for name in os.listdir(self.folder):
                if PART.fullmatch(name.removeprefix(".new.")):
                    (self.folder / name).unlink()
            with suppress(OSError):  # something else is in it
                self.folder.rmdir()

    def found(self) -> list[tuple[int, int, Path]]:
        """First batch, end and file of each part, in order.

        Raises:
            WriteError: the folder is gone.
        """
        with disk_errors(self.folder):
            matches = [PART.fullmatch(name) for name in sorted(os.listdir(self.folder))]
        return [(int(m[1]), int(m[2]), self.folder / m[0]) for m in matches if m]

    def drop_damaged(self) -> list[Path]:
        """Deletes parts that are not whole, so that they are computed again; which these were."""
        damaged = []
        for _, _, path in self.found():
            try:
                with zipfile.ZipFile(path) as archive:
                    bad = archive.testzip() is not None
            except (OSError, zipfile.BadZipFile, ValueError, EOFError):
                bad = True
            if bad:
                path.unlink()
                damaged.append(path)
        return damaged

    def missing(self) -> list[int]:
        """The batches that no part holds."""
        there = np.zeros(self.batches, bool)
        for first, stop, _ in self.found():
            there[first:stop] = True
        return np.flatnonzero(~there).tolist()

    def write(self, first: int, many: Sequence[Rows]) -> None:
        """Writes the rows of batches `first` and following.

        Raises:
            WriteError: the disk refused.
        """
        rows = joined(many)
        arrays: dict[str, Any] = {f"column:{name}": values for name, values in rows.columns.items()}
        arrays["names"], arrays["name_ends"] = _packed(rows.names)
        arrays["reasons"], arrays["reason_ends"] = _packed(rows.reasons)
        path = self.folder / f"part-{first:012}-{first + len(many):012}.npz"
        with disk_errors(self.folder), replacing(path) as fresh, fresh.open("wb") as opened:
            np.savez(opened, labels=rows.labels, **arrays)

    def read(self, columns: bool = True) -> Iterator[Rows]:
        """All rows in order, a part at a time; without `columns` only what names them.

        Raises:
            WriteError: a batch is in no part, or a part cannot be read.
        """
        done = 0
        for first, stop, path in self.found():
            if stop <= done:
                continue
            if first > done:
                break
            yield _read_part(path, columns).cut((done - first) * self.batch_size)
            done = stop
        if done < self.batches:
            raise WriteError(
                f"batch {done} of {self.batches} is in none of the parts in {self.folder}. "
                "Several machines need a folder for --output that all of them see"
            )


def _read_part(path: Path, columns: bool) -> Rows:
    try:
        with np.load(path, allow_pickle=False) as part:
            values = {
                name.partition(":")[2]: part[name]
                for name in part.files
                if columns and name.startswith("column:")
            }
            names = _unpacked(part["names"], part["name_ends"])
            reasons = _unpacked(part["reasons"], part["reason_ends"])
            return Rows(names, part["labels"], reasons, values)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise WriteError(
            f"{path} cannot be read: {error}. Start the same command again: it is computed again"
        ) from error


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turns an `OSError` of a disk into a `WriteError` that says where."""
    try:
        yield
    except BrokenPipeError:  # a reader of a printed table that has seen enough
        raise
    except OSError as error:
        raise WriteError(
            f"{where} cannot be written: {error.strerror or error}. What was stored before is "
            "kept: the same command goes on from there"
        ) from error


@dataclass
class _Run:
    """Batches in a row that are not written yet."""

    first: int
    began: float
    many: list[Rows] = field(default_factory=list)
    rows: int = 0
    size: int = 0


class PartWriter:
    """Collects the rows of batches, which come in any order, and writes parts of those in a row.

    Args:
        parts: where to.
        seconds: after which a part is written, whatever its size.
    """

    def __init__(self, parts: Parts, seconds: float) -> None:
        self.parts, self.seconds = parts, seconds
        self._runs: dict[int, _Run] = {}  # by the batch that would come next

    def add(self, number: int, rows: Rows) -> None:
        """Takes the rows of a batch; writes them if enough are there.

        Raises:
            WriteError: the disk refused.
        """
        run = self._runs.pop(number, None) or _Run(number, time.monotonic())
        run.many.append(rows)
        run.rows += len(rows)
        run.size += sum(values.nbytes for values in rows.columns.values())
        late = time.monotonic() - run.began >= self.seconds
        if late or run.rows >= ROWS_AT_MOST or run.size >= BYTES_AT_MOST:
            self.parts.write(run.first, run.many)
        else:
            self._runs[number + 1] = run

    def flush(self) -> None:
        """Writes what is left."""
        for run in self._runs.values():
            self.parts.write(run.first, run.many)
        self._runs = {}


# -- which run the parts are of -------------------------------------------------------------------


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`batch_size was 64, is 32`: what differs, in words."""
    names = list(dict.fromkeys([*before, *now]))
    return [
        f"{name} was {before.get(name, MISSING)}, is {now.get(name, MISSING)}"
        for name in names
        if before.get(name, MISSING) != now.get(name, MISSING)
    ]


def open_parts(
    output: Path, batches: int, batch_size: int, about: dict[str, Any], overwrite: bool
) -> Parts:
    """The parts of a table, those of an interrupted run of the same or none yet.

    Raises:
        OptionError: there is a table already, the parts are of another run, or nothing can be
            written there.
    """
    parts = Parts(Parts.folder_of(output), batches, batch_size)
    about = json.loads(json.dumps(about))
    try:
        before = parts.about()
        if before is not None and before != about and not overwrite:
            raise OptionError(
                f"--output {str(output)!r} was begun with other options: "
                f"{'; '.join(differences(before, about))}. Give the same to go on, another "
                "--output, or --overwrite to begin anew"
            )
        goes_on = before == about
        if goes_on:
            for path in parts.drop_damaged():
                print(f"warning: {path} was damaged; its rows are computed again", file=sys.stderr)
        if output.exists() and not overwrite and not (goes_on and not parts.missing()):
            raise OptionError(f"--output {str(output)!r} exists; --overwrite replaces it")
        if not goes_on:
            parts.delete()
            parts.begin(about)
    except OSError as error:
        raise OptionError(
            f"--output {str(output)!r} cannot be written: {error.strerror or error}"
        ) from error
    return parts
