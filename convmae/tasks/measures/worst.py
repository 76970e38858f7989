"""The few of many that have the lowest scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from convmae.training.distributed import World

Shown = TypeVar("Shown")
WORST = 6  # pictures that are kept to be shown


class Worst(Generic[Shown]):
    """Keeps what has the lowest scores, `WORST` of all that it is asked about."""

    def __init__(self) -> None:
        self.kept: list[tuple[float, Shown]] = []

    def wants(self, score: float) -> bool:
        """Whether something with this score would be kept."""
        return len(self.kept) < WORST or score < self.kept[-1][0]

    def keep(self, score: float, shown: Shown) -> None:
        """Keeps it, and lets go of what is no longer among the lowest."""
        self.kept = sorted([*self.kept, (score, shown)], key=lambda entry: entry[0])[:WORST]

    def of_all(self, world: World) -> list[tuple[float, Shown]]:
        """Scores and what is shown, the lowest first, of all processes together."""
        kept = [entry for part in world.gather(self.kept) for entry in part]
        return sorted(kept, key=lambda entry: entry[0])[:WORST]
