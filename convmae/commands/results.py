"""What the three `evaluate` commands do with their result: a file of it, and lines about files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convmae.data.errors import printable
from convmae.files import replacing
from convmae.records.unreadable import NAMED_AT_MOST

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convmae.data import Failure


def named_failures(failures: Sequence[Failure]) -> dict[str, str]:
    """Names and reasons of the first pictures that could not be read."""
    return {printable(name): why for name, why in failures[:NAMED_AT_MOST]}


def write_result(result: dict[str, Any], output: str) -> None:
    """Writes the result as JSON, whole or not at all; makes the folder of `output`."""
    path = Path(output).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as new:
        new.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def print_uncounted(result: dict[str, Any]) -> None:
    """Prints which pictures were not counted, and which files were left out."""
    if "unreadable" in result:
        print(f"unreadable, not counted: {result['unreadable']:,}")
        for name, reason in result.get("failures", {}).items():
            print(f"  {name}: {reason}")
    for left_out in result.get("left_out", ()):
        print(f"note: {left_out}")
