"""Which files a data set consists of: to tell whether a run goes on with the same pictures."""

from __future__ import annotations

import hashlib
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from convmae.data.errors import printable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SIZES_OF = 20_000  # files whose sizes are asked for; of more, an even sample
LISTED_AT_MOST = 100_000  # names that a checkpoint keeps; of more files it keeps the digest alone
LIST_AT_MOST = 2**27  # bytes of a list of names
NAMED_AT_MOST = 3  # names in a message


@dataclass(frozen=True)
class Fingerprint:
    """What `entries` come to: the same on every machine and wherever the files lie.

    Attributes:
        digest: SHA-256 of all names and sizes, in their order.
        count: how many files there are.
        listed: names and sizes, packed; None of more than `LISTED_AT_MOST`.
    """

    digest: str
    count: int
    listed: bytes | None

    @classmethod
    def of(cls, entries: Sequence[tuple[str, str]]) -> Fingerprint:
        """The fingerprint of relative names and what is known of each."""
        lines = [f"{printable(name)}\0{known}\n".encode() for name, known in entries]
        text = b"".join(lines)
        few = len(lines) <= LISTED_AT_MOST and len(text) <= LIST_AT_MOST
        listed = zlib.compress(text) if few else None
        return cls(hashlib.sha256(text).hexdigest(), len(lines), listed)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: tensors and plain values."""
        listed = None
        if self.listed is not None:
            listed = torch.frombuffer(bytearray(self.listed), dtype=torch.uint8)
        return {"digest": self.digest, "count": self.count, "listed": listed}

    @classmethod
    def from_state(cls, state: Any) -> Fingerprint | None:
        """What `state` gave; None if it is nothing of the kind."""
        try:
            listed = state["listed"]
            packed = None if listed is None else listed.numpy().tobytes()
            return cls(str(state["digest"]), int(state["count"]), packed)
        except (KeyError, TypeError, ValueError, AttributeError):
            return None

    def entries(self) -> dict[str, str] | None:
        """What is known of each name; None if the names were not kept."""
        if self.listed is None:
            return None
        try:
            text = zlib.decompressobj().decompress(self.listed, LIST_AT_MOST)
        except zlib.error:
            return None
        if hashlib.sha256(text).hexdigest() != self.digest:
            return None
        lines = text.decode().split("\n")[:-1]
        return dict(line.split("\0", 1) for line in lines)  # type: ignore[misc]

    def changes_since(self, before: Fingerprint) -> str | None:
        """What differs from `before`, in words; None if nothing does."""
        if self.digest == before.digest:
            return None
        mine, others = self.entries(), before.entries()
        if mine is None or others is None:
            return f"{before.count:,} files then, {self.count:,} now"
        parts = [
            _named([name for name in mine if name not in others], "added"),
            _named([name for name in others if name not in mine], "removed"),
            _named([n for n in mine if n in others and mine[n] != others[n]], "of another size"),
        ]
        return "; ".join(part for part in parts if part) or "the order of the files is another"


def _named(names: list[str], what: str) -> str:
    if not names:
        return ""
    first = ", ".join(sorted(names)[:NAMED_AT_MOST])
    return f"{len(names):,} {what} ({first}{', ...' if len(names) > NAMED_AT_MOST else ''})"


def file_entries(paths: Sequence[Path], root: Path) -> list[tuple[str, str]]:
    """Names relative to `root`, and the sizes in bytes of `SIZES_OF` of the files at most."""
    names = [path.relative_to(root).as_posix() for path in paths]
    asked = min(len(paths), SIZES_OF)
    chosen = [place * len(paths) // asked for place in range(asked)]
    with ThreadPoolExecutor(8) as pool:
        sizes = dict(zip(chosen, pool.map(_size, (paths[place] for place in chosen))))
    return [(name, sizes.get(place, "")) for place, name in enumerate(names)]


def _size(path: Path) -> str:
    try:
        return str(os.stat(path).st_size)
    except OSError:
        return "unknown"
