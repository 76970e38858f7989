"""The text of machine code: instructions, and the names of their operands."""

from __future__ import annotations

import re
from typing import NamedTuple

UNIFORM = 256  # where the uniform registers stand among the registers
RZ, URZ = 255, UNIFORM + 63  # registers that are 0
PT, UPT = 7, 15  # predicates that are true


class UnknownInstruction(NotImplementedError):
    """The text is an instruction, or has an operand, that this module does not know."""


class Instruction(NamedTuple):
    address: int
    guard: str  # "", "P0", "!P0", ...
    name: str  # with its modifiers: "IMAD.WIDE.U32"
    operands: tuple[str, ...]

    @property
    def kind(self) -> str:
        """The name without modifiers: `IMAD`."""
        return self.name.partition(".")[0]


def functions(text: str) -> dict[str, list[Instruction]]:
    """The kernels in the output of `cuobjdump -sass`, by symbol."""
    found: dict[str, list[Instruction]] = {}
    symbol = ""
    for line in text.splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            symbol = match[1]
        elif match := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?\w+) )?(\S+)\s*(.*?)\s*;", line):
            address, guard, name, operands = match.groups()
            parts = tuple(part.strip() for part in operands.split(",")) if operands else ()
            found.setdefault(symbol, []).append(
                Instruction(int(address, 16), guard or "", name, parts)
            )
    return found


def predicate(text: str) -> int:
    named = {"PT": PT, "UPT": UPT}
    match = re.fullmatch(r"(U?)P(\d)", text)
    if text in named:
        return named[text]
    if match is None:
        raise UnknownInstruction(f"{text} is no predicate")
    return int(match[2]) + (8 if match[1] else 0)


def is_predicate(text: str) -> bool:
    return re.fullmatch(r"!?U?P[T\d]", text) is not None


def register(text: str) -> int:
    match = re.fullmatch(r"(U?)R(Z|\d+)", text)
    if match is None:
        raise UnknownInstruction(f"{text} is no register")
    if match[2] == "Z":
        return URZ if match[1] else RZ
    return int(match[2]) + (UNIFORM if match[1] else 0)
