"""The files of results: each is whole at any moment, whatever is killed when.

`python -m benchmarks.gpu.store FILE STAGE OUTCOME SECONDS LIMIT [NOTE]` notes how a stage ended.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def load(path: Path) -> dict[str, Any]:
    """What a file holds; nothing if it is not there or damaged."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def update(path: Path, **parts: Any) -> None:
    """Puts parts into a JSON file, beside those that it holds; the file is replaced as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps({**load(path), **parts}, indent=1) + "\n")
    temporary.replace(path)


def main(arguments: list[str]) -> None:
    """Notes how a stage ended."""
    path, name, outcome, seconds, limit, *note = arguments
    stages = [stage for stage in load(Path(path)).get("stages", []) if stage["name"] != name]
    ended = {"name": name, "outcome": outcome, "seconds": int(seconds), "limit": int(limit)}
    update(Path(path), stages=[*stages, ended | {"note": " ".join(note)}])


if __name__ == "__main__":
    main(sys.argv[1:])
