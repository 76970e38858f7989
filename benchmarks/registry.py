"""The table of cases, by name. `cases`, `networks` and `decoder` fill it."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.runner import Comparison

Build = Callable[..., Comparison]


@dataclass(frozen=True)
class Case:
    """A name, one line about what is measured, and the function that builds it.

    Without `emulated` it is left out in half types that the CPU does not multiply: dense PyTorch
    takes minutes for it.
    """

    name: str
    about: str
    build: Build
    emulated: bool = True


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


def select(patterns: Sequence[str]) -> list[Case]:
    """The cases whose name, or a leading part of it, matches one of the patterns; all if none.

    Raises:
        ValueError: a pattern matches no case.
    """
    chosen: set[str] = set()
    for pattern in patterns or ["*"]:
        found = [
            name
            for name in CASES
            if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, pattern + "/*")
        ]
        if not found:
            raise ValueError(f"no case matches {pattern!r}; there are {', '.join(sorted(CASES))}")
        chosen.update(found)
    return [case for name, case in CASES.items() if name in chosen]
