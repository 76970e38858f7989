"""What of a data set is not read, or changed: counted by kind, the first of each kind named."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from convmae.data.errors import printable

if TYPE_CHECKING:
    from collections.abc import Iterable

NAMED_OF_A_KIND = 3
KINDS_AT_MOST = 50  # counted apart; the rest together
OTHER = "of other kinds"
SINGULAR = {"files": "file", "members": "member", "objects": "object"}


@dataclass
class LeftOut:
    """Files, or members of shards, that are no pictures of the data set.

    Attributes:
        what: in the plural, what they are: "files".
        counts: how many there are of each kind, such as ".txt" or "hidden".
        names: the first names of each kind, by the alphabet.
        done: what is done with them, in words.
    """

    what: str = "files"
    counts: dict[str, int] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    done: str = "left out"

    def add(self, kind: str, *names: str, count: int = 1) -> None:
        """Counts `count` more of a kind, of which `names` are some."""
        kind, *names = map(printable, (kind, *names))  # type: ignore[assignment]
        if kind not in self.counts and len(self.counts) >= KINDS_AT_MOST:
            kind = OTHER
        self.counts[kind] = self.counts.get(kind, 0) + count
        kept = self.names.setdefault(kind, [])
        if len(kept) < NAMED_OF_A_KIND or min(names, default=kept[-1]) < kept[-1]:
            self.names[kind] = sorted({*kept, *names})[:NAMED_OF_A_KIND]

    def merge(self, others: Iterable[LeftOut]) -> None:
        """Counts what `others` have counted."""
        for other in others:
            for kind, count in other.counts.items():
                self.add(kind, *other.names[kind], count=count)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __str__(self) -> str:
        """`37 files are left out: 30 .txt (a.txt, b.txt, c.txt, ...), 7 .xyz (...)`."""
        by_count = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        kinds = ", ".join(self._kind(kind, count) for kind, count in by_count)
        verb = "is" if self.total == 1 else "are"
        what = self.what
        for many, one in SINGULAR.items() if self.total == 1 else ():
            what = what.replace(many, one, 1)
        return f"{self.total:,} {what} {verb} {self.done}: {kinds}"

    def _kind(self, kind: str, count: int) -> str:
        names = self.names[kind]
        more = ", ..." if count > len(names) else ""
        return f"{count:,} {kind} ({', '.join(names)}{more})"


def kind_of(name: str) -> str:
    """The kind of a file that is no picture, by its name: its ending, "hidden" or "no ending"."""
    base = name.rpartition("/")[2]
    if base.startswith("."):
        return "hidden"
    ending = base.rpartition(".")[2] if "." in base else ""
    return f".{ending.lower()}" if ending else "without an ending"
