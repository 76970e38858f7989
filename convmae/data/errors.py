"""What can be wrong with pictures: one that cannot be read, and data that cannot be used."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from convmae.config.errors import MessageError

if TYPE_CHECKING:
    from collections.abc import Sequence


class DataError(MessageError, ValueError):
    """The pictures asked for cannot be used: missing, empty, or too many of them unreadable."""


class LoadingError(MessageError, RuntimeError):
    """A loading process died, or got no memory; the message says what to do."""


class UnreadableError(Exception):
    """One picture could not be decoded; the message says why."""


class Failure(NamedTuple):
    """A picture that could not be read: what it is called, and why."""

    name: str
    reason: str


def printable(text: str) -> str:
    """`text` in one line of UTF-8: what names of files may hold besides is written as escapes."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def check_share(
    failures: Sequence[Failure], total: int, limit: float, what: str = "pictures"
) -> None:
    """Raises `DataError` where more than the share `limit` of `total` pictures is unreadable."""
    count = len(failures)
    if count <= limit * total and count < total:
        return
    first = "; ".join(f"{name}: {reason}" for name, reason in failures[:5])
    if count >= total:
        raise DataError(f"none of the {total} {what} can be read. The first: {first}")
    share = count / total
    raise DataError(
        f"{count} of {total} {what} cannot be read ({share:.1%}), more than --max_unreadable "
        f"{limit:g} allows. The first: {first}"
    )
