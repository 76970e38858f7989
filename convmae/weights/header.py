"""The header of a safetensors file, read with limits: before tensors are, and before memory is."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import TYPE_CHECKING, Any, NoReturn

from convmae.config import WeightsError

if TYPE_CHECKING:
    from pathlib import Path

METADATA = "__metadata__"
MOST_HEADER = 64 << 20  # bytes; a thousand tensors need about 100,000
MOST_JSON = 16 << 20  # characters of one entry of the metadata


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; empty if it has none.

    Raises:
        WeightsError: the header is cut short, too long, no JSON, or names something twice.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError(
                    f"it says that its header has {length} bytes, but the file has {size} in all"
                )
            if length > MOST_HEADER:
                raise ValueError(f"its header has {length} bytes, expected at most {MOST_HEADER}")
            header = strict_json(opened.read(length).decode())
        metadata = header.get(METADATA, {}) if isinstance(header, dict) else None
        if not isinstance(metadata, dict) or not all(map(_is_text, metadata.values())):
            raise ValueError(f"its header is no dictionary with {METADATA} of texts")
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} is not readable as safetensors: {error}") from error
    return metadata


def strict_json(text: str) -> Any:
    """`json.loads` of finite numbers, no name twice, not too long and not too deep.

    Raises:
        ValueError: it is something else.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("lists or dictionaries are nested too deeply") from None


def described(metadata: dict[str, str], key: str) -> Any:
    """The value of an entry of the metadata that is written as JSON.

    Raises:
        ValueError: it is no such JSON, or too long.
    """
    text = metadata[key]
    if len(text) > MOST_JSON:
        raise ValueError(f"{key!r} has {len(text)} characters, expected at most {MOST_JSON}")
    try:
        return strict_json(text)
    except ValueError as error:
        raise ValueError(f"{key!r}: {error}") from None


def finite_numbers(name: str, value: Any) -> tuple[float, ...]:
    """The mean (`name` is `mean`) or deviation (`std`) of the channels.

    Raises:
        ValueError: it is no list of finite numbers, or a deviation is not above 0.
    """
    numbers: list[Any] = value if isinstance(value, list) and value else [None]
    for number in numbers:
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not is_number or not math.isfinite(number) or (name == "std" and number <= 0):
            raise ValueError(f"{name!r} is {str(value)[:80]}, expected finite numbers")
    return tuple(map(float, numbers))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{twice!r} is there twice")
    return values


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no finite number")


def _is_text(value: object) -> bool:
    return isinstance(value, str)
