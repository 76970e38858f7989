"""Small WebDataset shards of flat pictures, and ways to damage them."""

from __future__ import annotations

import io
import os
import tarfile
from typing import TYPE_CHECKING

import numpy as np
import pytest

from convmae.data import CentreTransform

if TYPE_CHECKING:
    from pathlib import Path

Image = pytest.importorskip("PIL.Image")
SIZES = (7, 4, 9, 5)
FIRST = np.cumsum((0, *SIZES)).tolist()


def picture(value: int, kind: str = "png") -> bytes:
    """A flat grey picture: its value tells which it is."""
    buffer = io.BytesIO()
    if kind == "npy":
        np.save(buffer, np.full((12, 12, 2), value, dtype=np.uint16))
    else:
        options = {"quality": 95} if kind == "jpg" else {}
        form = "JPEG" if kind == "jpg" else kind.upper()
        Image.new("RGB", (12, 12), (value, value, value)).save(buffer, form, **options)
    return buffer.getvalue()


def write_shard(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def sample(number: int, kind: str = "png", label: object | None = None) -> list[tuple[str, bytes]]:
    members = [(f"s{number:03}.{kind}", picture(10 * number, kind))]
    return members if label is None else [*members, (f"s{number:03}.cls", b"%d" % label)]


def write_shards(folder: Path, kind: str = "png") -> Path:
    """Four shards of 25 samples in all; sample `i` has the value `10 i` and the label `i % 3`."""
    for index, size in enumerate(SIZES):
        numbers = range(FIRST[index], FIRST[index] + size)
        members = [member for i in numbers for member in sample(i, kind, i % 3)]
        write_shard(folder / f"shard-{index:06}.tar", members)
    return folder


def values(batch) -> list[int]:
    return [round(float(image.float().mean()) / 10) for image in batch.images]


def keys(batches) -> list[tuple[int, int]]:
    return [tuple(key) for batch in batches for key in batch.keys.tolist()]


TINY = CentreTransform((8, 8))


def damage(path: Path, how: str) -> None:
    """Leaves samples s007 and s008 whole, of the four of the second shard."""
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        headers = {member.name: member for member in archive}
    third = headers["s009.png"]
    if how == "cut in a picture":
        del data[third.offset_data + 20 :]
    elif how == "cut between samples":
        del data[third.offset :]
    elif how == "a broken header":
        data[third.offset + 150] ^= 255  # of the checksum
    path.write_bytes(bytes(data))


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)
