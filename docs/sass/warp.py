"""The registers and the memory of a warp, and the way of its lanes through a kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from docs.sass.operands import LANES, MASK
from docs.sass.steps import ALL, compile_step
from docs.sass.text import PT, RZ, UNIFORM, UPT, URZ, Instruction, predicate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from docs.sass.reals import Step

PARAMETERS = 0x210  # where a kernel's parameters begin in constant bank 0
MEMORY_BASE = 1 << 33  # the address of the first byte of a warp's global memory
_SHARED_BYTES = 233472


class Warp:
    """A warp of a thread block whose first dimension is 32.

    Args:
        code: its kernel, one entry of `functions`.
        constants: what constant bank 0 holds from `PARAMETERS` on: the kernel's parameters.
        memory: global memory, uint8, a multiple of 16 bytes; its first byte has the address
            MEMORY_BASE. The kernel changes it.
        block: the coordinates of the thread block.
        row: which warp of the block it is.
    """

    def __init__(
        self,
        code: list[Instruction],
        constants: bytes,
        memory: np.ndarray,
        block: tuple[int, int, int] = (0, 0, 0),
        row: int = 0,
    ) -> None:
        self.code, self.memory = code, memory
        self.constants = bytes(PARAMETERS) + constants + bytes(16)
        self.special = {f"SR_CTAID.{axis}": value for axis, value in zip("XYZ", block, strict=True)}
        self.special |= {"SR_TID.Y": row, "SR_TID.Z": 0, "SR_CgaCtaId": 0}
        self.shared = np.zeros(_SHARED_BYTES, np.uint8)
        self.registers = np.zeros((UNIFORM + 64, LANES), np.uint32)
        self.predicates = np.zeros((16, LANES), bool)
        self.predicates[[PT, UPT]] = True
        self.issued = [0] * len(code)
        self._index = {instruction.address: i for i, instruction in enumerate(code)}
        self._steps: list[Step | None] = [None] * len(code)

    def run(self, limit: int = 10_000_000) -> int:
        """Runs until every lane has left the kernel; returns how many instructions were issued."""
        for _ in self.stretches(limit):
            pass
        return sum(self.issued)

    def stretches(self, limit: int = 10_000_000) -> Iterator[None]:
        """Runs from each barrier of the thread block to the next."""
        at, active = 0, ALL.copy()  # the lanes that go on, and the index of their instruction
        others: list[tuple[int, np.ndarray]] = []  # the same of lanes that went another way
        joins: dict[str, np.ndarray] = {}  # of a barrier: the lanes that meet there
        waiting: dict[str, np.ndarray] = {}  # of a barrier: those that have come
        alive = ALL.copy()
        for _ in range(limit):
            instruction = self.code[at]
            self.issued[at] += 1
            mask = active & self.guard(instruction.guard) if instruction.guard else active
            kind, operands = instruction.kind, instruction.operands
            after = at + 1
            if kind == "BSSY":
                if operands[0] in waiting:
                    raise RuntimeError(f"{operands[0]} is taken while lanes wait at it")
                joins[operands[0]] = active
            elif kind == "EXIT":
                alive &= ~mask
                active = active & ~mask
            elif kind == "BSYNC":
                came = waiting[operands[0]] = waiting.get(operands[0], ~ALL) | active
                complete = not (joins[operands[0]] & alive & ~came).any()
                active = waiting.pop(operands[0]) if complete else ~ALL
            elif kind in ("BRA", "CALL", "RET"):
                target, mask = self._target(instruction, mask)
                if mask.any() and (active & ~mask).any():
                    others.append((after, active & ~mask))
                if mask.any():
                    after, active = target, mask
            elif kind == "BAR":
                yield
            else:
                step = self._steps[at]
                if step is None:
                    step = self._steps[at] = compile_step(instruction)
                step(self, mask)
            if active.any():
                at = after
            elif others:
                at, active = others.pop()
            elif alive.any():
                raise RuntimeError("lanes wait for lanes that do not come")
            else:
                return
        raise RuntimeError(f"the kernel did not end within {limit} instructions")

    def count(self, *kinds: str) -> int:
        """How many of the instructions that were issued are of these kinds."""
        return sum(n for n, i in zip(self.issued, self.code, strict=True) if i.kind in kinds)

    def guard(self, text: str) -> np.ndarray:
        value = self.predicates[predicate(text.lstrip("!"))]
        return ~value if text.startswith("!") else value

    def _target(self, instruction: Instruction, mask: np.ndarray) -> tuple[int, np.ndarray]:
        if instruction.kind == "RET":
            register = int(instruction.operands[0].split()[0][1:])
            return self._index[int(self.registers[register][mask][0])], mask
        if instruction.kind == "BRA":
            for text in instruction.operands[:-1]:
                mask = mask & self.guard(text)
        return self._index[int(instruction.operands[-1], 16)], mask

    def constant(self, offset: int, bytes_: int) -> int:
        return int.from_bytes(self.constants[offset : offset + bytes_], "little")

    def write(self, register: int, value: np.ndarray, mask: np.ndarray) -> None:
        if register not in (RZ, URZ):
            np.copyto(self.registers[register], value.astype(np.uint32), where=mask)

    def write_wide(self, register: int, value: np.ndarray, mask: np.ndarray) -> None:
        """64 bits, to a pair of registers."""
        self.write(register, value & MASK, mask)
        if register not in (RZ, URZ):
            self.write(register + 1, value >> np.uint64(32), mask)

    def write_predicate(self, index: int, value: np.ndarray, mask: np.ndarray) -> None:
        if index not in (PT, UPT):
            np.copyto(self.predicates[index], value, where=mask)

    def words(self, space: np.ndarray, address: np.ndarray, size: int) -> np.ndarray:
        """Where in `space`, as an array of `size` bytes each, these addresses lie."""
        if space is self.memory:
            address = address - np.uint64(MEMORY_BASE)
        if (address % np.uint64(size)).any() or (address + np.uint64(size) > space.nbytes).any():
            raise RuntimeError(f"an access of {size} bytes outside of memory, or misaligned")
        return (address // np.uint64(size)).astype(np.int64)


def run_block(warps: list[Warp]) -> None:
    """Runs the warps of a thread block, which share their memory and meet at its barriers."""
    for warp in warps[1:]:
        warp.shared = warps[0].shared
    for _ in zip(*(warp.stretches() for warp in warps), strict=True):
        pass
