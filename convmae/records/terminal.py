"""The terminal of a run, which may go away while the run goes on."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def say(text: object, error: bool = False) -> None:
    """Prints a line at once, to stderr if `error`."""
    with surviving():
        print(text, file=sys.stderr if error else sys.stdout, flush=True)


@contextmanager
def surviving() -> Iterator[None]:
    """Printing in here ends no run: where nobody reads any more, it goes nowhere from then on."""
    try:
        yield
    except OSError:  # a closed terminal (EIO), a pipe that nobody reads (EPIPE), a full disk
        for stream in (sys.stdout, sys.stderr):
            _silence_if_dead(stream)


def _silence_if_dead(stream: object) -> None:
    """What is left in the buffer goes nowhere too: Python would fail on it when it exits."""
    try:
        stream.flush()  # type: ignore[attr-defined]
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # type: ignore[attr-defined]
        os.close(nowhere)
