"""Operands that are read, with their values in all lanes."""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from docs.sass.text import (
    RZ,
    URZ,
    Instruction,
    UnknownInstruction,
    is_predicate,
    predicate,
    register,
)

if TYPE_CHECKING:
    from docs.sass.warp import Warp

LANES = 32
MASK = np.uint64(0xFFFFFFFF)


class Source:
    """An operand that is read: a register, a number, or a constant, with its sign and selection."""

    def __init__(self, text: str) -> None:
        text = re.sub(r"\.reuse|\.64\b", "", text)
        self.sign = text[0] if text[0] in "-~" and not re.match(r"-0x|-\d", text) else ""
        text = text[len(self.sign) :]
        self.absolute = text.startswith("|")
        text = text.strip("|")
        text, _, self.part = text.partition(".") if re.match(r"U?R", text) else (text, "", "")
        self.register, self.constant, self.number = -1, -1, 0
        if match := re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", text):
            self.constant = int(match[1], 16)
        elif re.match(r"U?R", text):
            self.register = register(text)
        elif re.fullmatch(r"-?0x[0-9a-f]+", text):
            self.number = int(text, 16) & 0xFFFFFFFF
        elif re.fullmatch(r"-?(\d+(\.\d+)?(e[+-]?\d+)?|inf|INF)|[+-]QNAN", text):
            self.number = struct.unpack("I", struct.pack("f", float(text.replace("Q", ""))))[0]
        else:
            raise UnknownInstruction(f"the operand {text}")

    def raw(self, warp: Warp, high: bool = False) -> np.ndarray:
        """The 32 bits, or those of the second register of a pair."""
        if self.register in (RZ, URZ):
            return np.zeros(LANES, np.uint32)
        if self.register >= 0:
            return warp.registers[self.register + high]
        number = self.number if self.constant < 0 else warp.constant(self.constant + 4 * high, 4)
        return np.full(LANES, 0 if high and self.constant < 0 else number, np.uint32)

    def integer(self, warp: Warp) -> np.ndarray:
        """uint64; a minus sign gives 2^32 - x, so that what carries out of 32 bits is right."""
        value = self.raw(warp).astype(np.uint64)
        if self.sign == "-":
            return (value ^ MASK) + np.uint64(1)
        return value ^ MASK if self.sign == "~" else value

    def signed(self, warp: Warp) -> np.ndarray:
        return (self.integer(warp) & MASK).astype(np.uint32).view(np.int32).astype(np.int64)

    def wide(self, warp: Warp) -> np.ndarray:
        """uint64, from a pair of registers."""
        value = self.raw(warp).astype(np.uint64) | self.raw(warp, True).astype(np.uint64) << 32
        return ~value + np.uint64(1) if self.sign == "-" else value

    def real(self, warp: Warp) -> np.ndarray:
        value = self.raw(warp).view(np.float32)
        if self.part in ("H0_H0", "H1_H1"):
            halves = np.ascontiguousarray(self.raw(warp)).view(np.float16)
            value = halves[self.part == "H1_H1" :: 2].astype(np.float32)
        value = np.abs(value) if self.absolute else value
        return -value if self.sign == "-" else value


class Operands(NamedTuple):
    out: int  # the register that is written
    carries_out: list[int]
    sources: list[Source]
    predicates_in: list[str]


def split(instruction: Instruction) -> Operands:
    """Those of an arithmetic instruction: register, predicates out, sources, predicates in."""
    operands = list(instruction.operands)
    carries = []
    while is_predicate(operands[0]):  # LOP3.LUT P0, R1, ... writes a predicate first
        carries.append(predicate(operands.pop(0)))
    out = register(operands.pop(0))
    while operands and is_predicate(operands[0]):
        carries.append(predicate(operands.pop(0)))
    inputs: list[str] = []
    while operands and is_predicate(operands[-1]):
        inputs.insert(0, operands.pop())
    return Operands(out, carries, [Source(text) for text in operands], inputs)
