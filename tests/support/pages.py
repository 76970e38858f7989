"""Runs what a page of the documentation shows, block by block, and compares what is printed.

- A `python` block runs in one program with those before it; a `text` block that follows is what it
  prints.
- In a `console` block a line that begins with `$ convmae` runs that command; the lines below it are
  what it prints. A backslash at its end continues a command.

`[...]` stands for anything, several lines too. A number with a decimal point may be off by 15 %:
sums are made in another order on other machines. Everything else must be the same.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from convmae.cli import main

if TYPE_CHECKING:
    from pathlib import Path

ANYTHING = "[...]"
DECIMAL = r"-?\d+\.\d+(?:e-?\d+)?"


@dataclass
class Step:
    """A program or a command of a page, and what it prints by the page (None: that is not said)."""

    line: int
    code: str
    is_command: bool
    expected: str | None = None


def steps(text: str) -> list[Step]:
    """The steps of a page, in its order.

    Raises:
        ValueError: a command that is not one of convmae's, or an output of nothing.
    """
    found: list[Step] = []
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        language, body = match.groups()
        line = text.count("\n", 0, match.start()) + 2
        if language == "python":
            found.append(Step(line, body, is_command=False))
        elif language == "text":
            if not found or found[-1].is_command or found[-1].expected is not None:
                raise ValueError(f"line {line}: a text block must follow a python block")
            found[-1].expected = body
        elif language == "console":
            for part in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
                command, _, expected = part.replace("\\\n", " ").partition("\n")
                if not command.startswith("convmae "):
                    raise ValueError(
                        f"line {line}: only commands of convmae run, found {command!r}"
                    )
                found.append(Step(line, command, True, expected if expected.strip() else None))
    return found


def run(page: Path) -> None:
    """Runs a page in the current folder.

    Raises:
        AssertionError: a command fails, or something else is printed than the page says.
    """
    names: dict[str, object] = {"__name__": "__main__"}
    for step in steps(page.read_text()):
        where = f"{page.name}, line {step.line}"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            if step.is_command:
                status = main(shlex.split(step.code)[1:])
                assert status == 0, f"{where}: exit status {status} of {step.code}"
            else:
                exec(compile("\n" * (step.line - 1) + step.code, str(page), "exec"), names)
        if step.expected is not None:
            reason = difference(step.expected, printed.getvalue())
            assert reason is None, f"{where}: {reason}\n--- printed:\n{printed.getvalue()}"


def difference(expected: str, printed: str) -> str | None:
    """Where the printed text differs from the expected, or None."""
    pattern, numbers = "", []
    for piece in re.split(rf"({re.escape(ANYTHING)}|{DECIMAL})", _trimmed(expected)):
        if piece == ANYTHING:
            pattern += "(?:.*)"
        elif re.fullmatch(DECIMAL, piece):
            pattern += f"({DECIMAL})"
            numbers.append(float(piece))
        else:
            pattern += re.escape(piece)
    match = re.fullmatch(pattern, _trimmed(printed), re.DOTALL)
    if match is None:
        return f"it should print\n{expected}"
    for number, text in zip(numbers, match.groups(), strict=True):
        if not math.isclose(number, float(text), rel_tol=0.15, abs_tol=1e-6):
            return f"it should print {number}, not {text}"
    return None


def _trimmed(text: str) -> str:
    """Without spaces at the ends of lines, and without empty lines at both ends."""
    return "\n".join(line.rstrip() for line in text.splitlines()).strip("\n")
