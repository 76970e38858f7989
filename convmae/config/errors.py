"""Errors that name options: as arguments in Python, as flags on the command line."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterator

# A command to type, between backticks, stays as it is; so does `--` inside a word.
_FLAG = re.compile(r"(`[^`]*`)|(?<![\w-])--(?=[A-Za-z_])")


class MessageError(Exception):
    """An error whose message writes options as flags, `--mask_ratio`.

    `str` of it names them as Python does, `mask_ratio`; the command line prints `with_flags`.

    Attributes:
        keep_flags: whether `str` leaves the flags; for a process that hands its errors to another
            as text, as PyTorch's loading processes do.
    """

    keep_flags: ClassVar[bool] = False

    @property
    def with_flags(self) -> str:
        """The message as it was written."""
        return super().__str__()

    def __str__(self) -> str:
        if MessageError.keep_flags:
            return self.with_flags
        return _FLAG.sub(lambda found: found[1] or "", self.with_flags)


class OptionError(MessageError, ValueError):
    """An option has a value that cannot work; the message begins with the option."""


class WeightsError(MessageError, ValueError):
    """A file or folder holds no weights that can be used; the message says which and why."""


class WeightsWarning(UserWarning):
    """Something to know about weights that were loaded all the same."""


@contextmanager
def for_option(name: str) -> Iterator[None]:
    """Turns a `WeightsError` into an `OptionError` that says which option named the file.

    Args:
        name: of the option, such as "checkpoint". A message that begins with another option is
            left as it is.
    """
    try:
        yield
    except WeightsError as error:
        message = error.with_flags
        if message.startswith("path "):  # the argument of the function that was called
            message = f"--{name} {message.removeprefix('path ')}"
        elif not message.startswith("--"):
            message = f"--{name}: {message}"
        raise OptionError(message) from error
