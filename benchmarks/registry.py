"""The table of cases, by name. `cases`, `networks` and `decoder` fill it."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.runner import Comparison

if TYPE_CHECKING:
    import torch

Build = Callable[..., Comparison]


@dataclass(frozen=True)
class Case:
    """A name, one line about what is measured, and the function that builds it.

    Without `emulated` it is left out in half types that the CPU does not multiply: dense PyTorch
    takes minutes for it.

    Attributes:
        dtypes: the dtypes that it is for; None for those that the user wants.
        threads: CPU threads to measure with; None for those of the run.
        at: see `Row.at`.
    """

    name: str
    about: str
    build: Build
    emulated: bool = True
    dtypes: tuple[torch.dtype, ...] | None = None
    threads: int | None = None
    at: Mapping[str, Any] = field(default_factory=dict)


CASES: dict[str, Case] = {}


def register(name: str, *, emulated: bool = True, **options: object) -> Callable[[Build], Build]:
    """Registers a case under `name`, described by its docstring's first line.

    Keyword arguments are handed to the function. Decorators stack, one case each, lowest first.

    Raises:
        ValueError: there is a case of that name already.
    """

    def add(build: Build) -> Build:
        if name in CASES:
            raise ValueError(f"there are two cases of the name {name!r}")
        about = (build.__doc__ or "").strip().splitlines()[0]
        CASES[name] = Case(name, about, partial(build, **options), emulated)
        return build

    return add


def select(patterns: Sequence[str], cases: Iterable[Case] | None = None) -> list[Case]:
    """The cases whose name, or a leading part of it, matches one of the patterns; all if none.

    Args:
        patterns: names or globs.
        cases: which to choose from; those of `CASES` if None.

    Raises:
        ValueError: a pattern matches no case.
    """
    known = CASES if cases is None else {case.name: case for case in cases}
    chosen: set[str] = set()
    for pattern in patterns or ["*"]:
        found = [
            name
            for name in known
            if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, pattern + "/*")
        ]
        if not found:
            raise ValueError(f"no case matches {pattern!r}; there are {', '.join(sorted(known))}")
        chosen.update(found)
    return [case for name, case in known.items() if name in chosen]
