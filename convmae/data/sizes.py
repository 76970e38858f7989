"""`sizes.json`: how many samples the shards beside it have. Its form is told in `shards.py`."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from convmae.data.classes import name_problem
from convmae.data.errors import DataError
from convmae.data.left_out import LeftOut

SIZES_FILE = "sizes.json"
SHARD = ".tar"
SIZES_HELP = (
    f"python -m convmae.data.shards FOLDER writes {SIZES_FILE} for the shards in a local folder; "
    'it is an object like {"shard-000000.tar": 10000}'
)
SIZES_AT_MOST = 2**26  # bytes
SAMPLES_AT_MOST = 10**8  # samples of a shard


class Sizes(NamedTuple):
    """What a `sizes.json` tells."""

    counts: dict[str, int]
    classes: list[str] | None
    left_out: LeftOut | None


def parse_sizes(data: bytes, sizes_file: str) -> Sizes:
    """The contents of `sizes.json`.

    Raises:
        DataError: it does not have that form, or announces what no shard can hold.
    """
    if len(data) > SIZES_AT_MOST:
        raise DataError(
            f"{sizes_file} is larger than {SIZES_AT_MOST:,} bytes; expected names and counts only. "
            f"{SIZES_HELP}"
        )
    try:
        values = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise DataError(f"{sizes_file} is no JSON: {reason}. {SIZES_HELP}") from error
    mapping = isinstance(values, dict)
    classes = values.pop("classes", None) if mapping else None
    others = values.pop("left_out", None) if mapping else None
    right = mapping and all(
        type(size) is int and size >= 0 and name.endswith(SHARD) and not re.search(r"[/\\:]", name)
        for name, size in values.items()
    )
    named = classes is None or (
        isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    )
    left_out = None if others is None else _read_left_out(others)
    if not right or not named or (others is not None and left_out is None):
        raise DataError(
            f"{sizes_file} does not hold names of shards and their counts. {SIZES_HELP}"
        )
    for name, size in values.items():
        if size > SAMPLES_AT_MOST:
            raise DataError(
                f"{sizes_file} says that {name} holds {_shortened(size)} samples; expected at most "
                f"{SAMPLES_AT_MOST:,} in a shard. {SIZES_HELP}"
            )
    problem = None if classes is None else name_problem(classes)
    if problem is not None:
        raise DataError(
            f'{sizes_file}: "classes": {problem}; expected a name for each class, all different'
        )
    return Sizes(values, classes or None, left_out)


def _shortened(size: int) -> str:
    return f"{size:,}" if size < 10**30 else "more than 10^30"


def _read_left_out(values: Any) -> LeftOut | None:
    """What `"left_out"` of a `sizes.json` tells; None if it is of another form."""
    left_out = LeftOut("members of shards")
    if not isinstance(values, dict):
        return None
    for kind, entry in values.items():
        right = isinstance(entry, list) and len(entry) > 1 and type(entry[0]) is int
        if not right or not all(isinstance(name, str) for name in entry[1:]):
            return None
        left_out.add(kind, *entry[1:], count=entry[0])
    return left_out
