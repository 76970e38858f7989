"""`python -m benchmarks --full`: the points of sweeps, the parts of a step, and the peers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import fits, parts, peers, sweeps

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from benchmarks.registry import Case
    from benchmarks.runner import Row
    from benchmarks.setting import Setting

BUDGET = 1.0  # seconds of a point, if three rounds fit


def cases(
    setting: Setting, dtypes: Sequence[torch.dtype], quick: bool, known: peers.Checkouts
) -> list[Case]:
    """Everything that is measured, in order.

    Args:
        setting: where the axes of the sweeps cross.
        dtypes: that of the centre, then the others.
        quick: fewer points.
        known: checkouts of the peers' code.
    """
    images = 1 if quick else sweeps.STEP_BATCH
    of_step = replace(setting, batch_size=min(setting.batch_size, images))
    return [
        *sweeps.cases(setting, dtypes, quick),
        *parts.cases(of_step, dtypes[0]),
        *peers.cases(setting, dtypes[0], known, quick),
    ]


def missing(chosen: Iterable[Case], rows: Iterable[Row]) -> list[Case]:
    """The cases that a file of rows lacks; the peers' always, as others may be there now."""
    there = {(row.case, row.dtype) for row in rows}
    return [
        case
        for case in chosen
        if case.at["axis"] == "peer"
        or any((case.name, str(dtype)[6:]) not in there for dtype in case.dtypes or ())
    ]


def check_same_threads(environment: Mapping[str, Any], file: str) -> None:
    """Raises ValueError where a run to go on with had other threads: its centres are elsewhere."""
    there, here = environment["threads"], torch.get_num_threads()
    if there != here:
        raise ValueError(f"{file} is of a run with --threads {there}, and this one has {here}")


def lasting(notes: Iterable[str], again: Iterable[Case]) -> list[str]:
    """The notes of a file that are of no case that is measured again."""
    prefixes = ("official ", "spconv: ", *(f"{case.name} in " for case in again))
    return [note for note in notes if not note.startswith(prefixes)]


def is_of_a_peer(failure: str) -> bool:
    """Whether a failure is one of other people's code, which is no failure of the run."""
    return any(f"left out {name}: " in failure for name in peers.PEERS)


def lines(rows: Sequence[Row]) -> list[list[str]]:
    """The cost of every op against the visible share, for a terminal; empty if none was swept."""
    cells = fits.table(rows)
    return cells if len(cells) > 1 else []
