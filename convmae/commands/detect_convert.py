"""`convmae detect convert`: annotations of objects to COCO's JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from convmae.config import OptionError
from convmae.data.objects.coco import as_coco
from convmae.data.objects.open import open_objects
from convmae.files import replacing

if TYPE_CHECKING:
    from convmae.config import DetectConvertConfig


def detect_convert(config: DetectConvertConfig) -> list[str]:
    """Writes the checked annotations of a split to `config.output`, as COCO's JSON.

    Returns:
        What to tell about it.

    Raises:
        OptionError (a ValueError): an option cannot work, or the file exists.
        convmae.data.DataError (a ValueError): annotations that cannot be used.
    """
    config.validate()
    path = Path(config.output).expanduser()
    if path.exists() and not config.overwrite:
        raise OptionError(f"--output {config.output!r} exists; give another, or --overwrite")
    source = open_objects(
        config.data_path,
        config.split,
        config.object_options(config.split),
        config.reading,
        config.max_unreadable,
    )
    annotations = source.annotations
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as new:
        new.write_text(json.dumps(as_coco(annotations)) + "\n", encoding="utf-8")
    return [
        *(f"note: {note}" for note in source.notes),
        f"wrote {path}: {len(annotations.pictures):,} pictures, {annotations.objects:,} objects of "
        f"{len(annotations.classes)} classes",
    ]


def main(config: DetectConvertConfig) -> int:
    """The command: `detect_convert`, and what it says of itself; returns the exit status."""
    for line in detect_convert(config):
        print(line)
    return 0
