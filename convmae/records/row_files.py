"""Rows as files that others read: CSV, JSON lines, Parquet, and NumPy's .npy and .npz."""

from __future__ import annotations

import csv
import json
import zipfile
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from convmae.config import OptionError
from convmae.files import replacing
from convmae.records.parts import Rows, joined

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path
    from typing import TextIO

    from convmae.records.parts import Parts

ROWS_OF_A_GROUP = 8192  # of Parquet; fewer where they are large
BYTES_OF_A_GROUP = 64 * 2**20
EPOCH = (1980, 1, 1, 0, 0, 0)  # so that equal contents are equal files


def check_format(table_format: str) -> None:
    """Raises `OptionError` where a format needs what is not installed."""
    if table_format == "parquet" and find_spec("pyarrow") is None:
        raise OptionError(
            "--format parquet needs pyarrow: pip install pyarrow; the other formats do not"
        )


def legible(name: str) -> str:
    """A file's name as text that every format holds: bytes that are no UTF-8 as `\\xff`."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return name


# -- text -----------------------------------------------------------------------------------------


def write_csv(records: Iterable[dict[str, Any]], columns: Sequence[str], opened: TextIO) -> None:
    """A line of column names, then a line for each record; None is empty."""
    writer = csv.writer(opened, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_number(record[column]) for column in columns] for record in records)


def write_jsonl(records: Iterable[dict[str, Any]], opened: TextIO) -> None:
    """An object for each record; None is null."""
    for record in records:
        values = {name: _number(value) for name, value in record.items()}
        opened.write(json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n")


def _number(value: Any) -> Any:
    """A float of six digits, without those that binary fractions add."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


@contextmanager
def new_text(path: Path) -> Iterator[TextIO]:
    """A file of UTF-8 that takes the place of `path` when it is whole."""
    with replacing(path) as fresh, fresh.open("w", encoding="utf-8", newline="") as opened:
        yield opened


# -- Parquet --------------------------------------------------------------------------------------


def regrouped(parts: Iterable[Rows]) -> Iterator[Rows]:
    """The same rows in groups that do not depend on the parts that they come from."""
    held: list[Rows] = []
    count, wanted = 0, 0
    for rows in parts:
        if not len(rows):
            continue
        size = max(1, sum(values.nbytes for values in rows.columns.values()) // len(rows))
        wanted = wanted or max(1, min(ROWS_OF_A_GROUP, BYTES_OF_A_GROUP // size))
        held.append(rows)
        count += len(rows)
        while count >= wanted:
            whole = joined(held)
            yield whole.cut(0, wanted)
            held, count = [whole.cut(wanted)], count - wanted
    if count:
        yield joined(held)


def write_parquet(tables: Iterable[Any], path: Path) -> None:
    """Arrow tables, each a row group, into a file that takes the place of `path`."""
    import pyarrow.parquet as parquet

    with replacing(path) as fresh:
        writer = None
        for table in tables:
            writer = writer or parquet.ParquetWriter(fresh, table.schema)
            writer.write_table(table)
        assert writer is not None
        writer.close()


# -- NumPy ----------------------------------------------------------------------------------------


def write_npy(parts: Parts, column: str, path: Path) -> None:
    """A column as one array, a part in memory at a time."""
    with replacing(path) as fresh, fresh.open("wb") as opened:
        for piece in _npy_pieces(parts, column):
            opened.write(piece)


def write_npz(parts: Parts, column: str, texts: dict[str, Any], path: Path) -> None:
    """A column, and arrays of text, as one archive that `numpy.load` reads.

    Args:
        parts: the rows.
        column: its name, in the archive too.
        texts: for each array of text its name, and what makes it of rows: a list.
        path: to write.
    """
    with replacing(path) as fresh, zipfile.ZipFile(fresh, "w") as archive:
        pieces = {column: _npy_pieces(parts, column)}
        pieces |= {name: _text_pieces(parts, function) for name, function in texts.items()}
        for name, content in pieces.items():
            entry = zipfile.ZipInfo(f"{name}.npy", EPOCH)
            with archive.open(entry, "w", force_zip64=True) as opened:
                for piece in content:
                    opened.write(piece)


def _npy_pieces(parts: Parts, column: str) -> Iterator[bytes]:
    rows = sum(len(each) for each in parts.read(columns=False))
    for place, each in enumerate(parts.read()):
        values = each.columns[column]
        if place == 0:
            yield _header((rows, *values.shape[1:]), values.dtype)
        yield np.ascontiguousarray(values).tobytes()


def _text_pieces(parts: Parts, function: Any) -> Iterator[bytes]:
    rows = longest = 0
    for each in parts.read(columns=False):
        texts = function(each)
        rows, longest = rows + len(texts), max(longest, *map(len, texts))
    dtype = np.dtype(f"<U{max(1, longest)}")
    yield _header((rows,), dtype)
    for each in parts.read(columns=False):
        yield np.array(function(each), dtype).tobytes()


def _header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """What an `.npy` file begins with."""
    import io

    buffer = io.BytesIO()
    described = np.lib.format.dtype_to_descr(dtype)
    header = {"descr": described, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_2_0(buffer, header)
    return buffer.getvalue()
