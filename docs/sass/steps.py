"""What each instruction of compute capability 9.0 does to the lanes of a warp."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from docs.sass import reals
from docs.sass.operands import LANES, MASK, Source, split
from docs.sass.text import RZ, URZ, Instruction, UnknownInstruction, predicate, register

if TYPE_CHECKING:
    from collections.abc import Callable

    from docs.sass.reals import Step
    from docs.sass.warp import Warp

ALL = np.ones(LANES, bool)


def _for_all_lanes(step: Step) -> Step:
    """A uniform register is one for all lanes, also for those that wait elsewhere."""
    return lambda warp, mask: step(warp, ALL) if mask.any() else None


def compile_step(instruction: Instruction) -> Step:
    """The step that the instruction is, with its operands read once."""
    kind, name = instruction.kind, instruction.name
    if kind in ("NOP", "DEPBAR", "LDGDEPBAR", "WARPSYNC", "CCTL"):
        return lambda warp, mask: None  # one warp: the scheduler of `run` keeps its lanes together
    for family, build in _FAMILIES.items():
        if re.fullmatch(family, kind):
            try:
                step = build(instruction._replace(name=name.removeprefix("U")))
            except UnknownInstruction as error:
                raise UnknownInstruction(f"{instruction}: {error}") from None
            return _for_all_lanes(step) if kind.startswith("U") or kind == "S2UR" else step
    raise UnknownInstruction(f"{instruction}")


def _move(i: Instruction) -> Step:
    out, source = register(i.operands[0]), Source(i.operands[1])
    return lambda w, m: w.write(out, source.integer(w), m)


def _constant(i: Instruction) -> Step:  # LDC, ULDC
    out, source = register(i.operands[0]), Source(i.operands[1])
    if source.constant < 0:
        raise UnknownInstruction("a constant at an address from a register")
    size = 8 if ".64" in i.name else 1 if ".U8" in i.name else 4

    def step(w: Warp, m: np.ndarray) -> None:
        value = np.full(LANES, w.constant(source.constant, size), np.uint64)
        (w.write_wide if size == 8 else w.write)(out, value, m)

    return step


def _special(i: Instruction) -> Step:  # S2R, S2UR, CS2R
    out, name = register(i.operands[0]), i.operands[1]

    def step(w: Warp, m: np.ndarray) -> None:
        if i.kind == "CS2R" and name == "SRZ":
            w.write_wide(out, np.zeros(LANES, np.uint64), m)
        elif name == "SR_TID.X" or name == "SR_LANEID":
            w.write(out, np.arange(LANES), m)
        elif name in w.special:
            w.write(out, np.full(LANES, w.special[name]), m)
        else:
            raise UnknownInstruction(f"{i}")

    return step


def _add(i: Instruction) -> Step:  # IADD3, VIADD
    o = split(i)

    def step(w: Warp, m: np.ndarray) -> None:
        total = sum((s.integer(w) for s in o.sources), np.zeros(LANES, np.uint64))
        for text in o.predicates_in:
            total = total + w.guard(text)
        w.write(o.out, total & MASK, m)
        for n, carry in enumerate(o.carries_out):
            w.write_predicate(carry, total >> np.uint64(32) > n, m)

    return step


def _multiply_add(i: Instruction) -> Step:  # IMAD
    o = split(i)
    a, b, c = o.sources
    unsigned = ".U32" in i.name

    def product(w: Warp) -> np.ndarray:
        if unsigned:
            return (a.integer(w) & MASK) * (b.integer(w) & MASK)
        return (a.signed(w) * b.signed(w)).astype(np.uint64)

    def step(w: Warp, m: np.ndarray) -> None:
        if ".WIDE" in i.name or ".HI" in i.name:
            p = product(w)
            total = p + c.wide(w)
            for carry in o.carries_out:
                w.write_predicate(carry, total < p, m)
            if ".HI" in i.name:
                w.write(o.out, total >> np.uint64(32), m)
            else:
                w.write_wide(o.out, total, m)
            return
        total = product(w) + c.integer(w)
        for text in o.predicates_in:
            total = total + w.guard(text)
        w.write(o.out, total & MASK, m)

    return step


def _scaled_add(i: Instruction) -> Step:  # LEA
    o = split(i)
    high = ".HI" in i.name
    a, b = o.sources[:2]
    shift = np.uint64(o.sources[-1].number)
    above = o.sources[2] if high and ".SX32" not in i.name else None

    def step(w: Warp, m: np.ndarray) -> None:
        value = (a.integer(w) & MASK) << shift
        if high:
            low = a.integer(w) & MASK
            top = (a.signed(w) >> 31).astype(np.uint64) if above is None else above.integer(w)
            value = (low | top << np.uint64(32)) << shift >> np.uint64(32)
        total = (value & MASK) + b.integer(w)
        for text in o.predicates_in:
            total = total + w.guard(text)
        w.write(o.out, total & MASK, m)
        for carry in o.carries_out:
            w.write_predicate(carry, total >> np.uint64(32) > 0, m)

    return step


def _table(table: int, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The bits that a truth table of eight entries gives for those of a, b and c."""
    value = np.zeros_like(a)
    for entry in range(8):
        if table >> entry & 1:
            value |= (a if entry & 4 else ~a) & (b if entry & 2 else ~b) & (c if entry & 1 else ~c)
    return value


def _logic(i: Instruction) -> Step:  # LOP3.LUT
    o = split(i)
    a, b, c, table = o.sources

    def step(w: Warp, m: np.ndarray) -> None:
        value = _table(table.number, a.raw(w), b.raw(w), c.raw(w))
        w.write(o.out, value, m)
        for carry in o.carries_out:
            w.write_predicate(carry, (value != 0) | w.guard(o.predicates_in[0]), m)

    return step


def _logic_of_predicates(i: Instruction) -> Step:  # PLOP3.LUT
    out, other, *sources = i.operands
    tables = [int(text, 16) for text in sources[3:]]
    if other != "PT" and other != "UPT":
        raise UnknownInstruction("a second result")

    def step(w: Warp, m: np.ndarray) -> None:
        a, b, c = (w.guard(text) for text in sources[:3])
        w.write_predicate(predicate(out), _table(tables[0], a, b, c), m)

    return step


def _shift(i: Instruction) -> Step:  # SHF
    o = split(i)
    low, amount, high = o.sources
    left, signed = ".L." in i.name, ".S" in i.name
    wide, upper = "64" in i.name, ".HI" in i.name
    if ".W" in i.name:
        raise UnknownInstruction("a shift that wraps")

    def step(w: Warp, m: np.ndarray) -> None:
        by = np.minimum(amount.raw(w), 63 if wide else 32).astype(np.uint64)
        value = low.raw(w).astype(np.uint64) | high.raw(w).astype(np.uint64) << 32
        if left:
            value = value << by
        elif signed:
            value = (value.astype(np.int64) >> by.astype(np.int64)).astype(np.uint64)
        else:
            value = value >> by
        w.write(o.out, value >> np.uint64(32) if upper else value & MASK, m)

    return step


def _compare(i: Instruction) -> Step:  # ISETP
    _, how, *modifiers = i.name.split(".")
    unsigned, extended, either = ("U32" in modifiers, "EX" in modifiers, "OR" in modifiers)
    first, second = (predicate(text) for text in i.operands[:2])
    a, b = Source(i.operands[2]), Source(i.operands[3])
    inputs = i.operands[4:]

    def step(w: Warp, m: np.ndarray) -> None:
        if unsigned:
            x, y = a.integer(w) & MASK, b.integer(w) & MASK
        else:
            x, y = a.signed(w), b.signed(w)
        if extended:  # the low halves were compared before
            below = w.guard(inputs[1])
            strict = {"G": x > y, "L": x < y, "N": x != y, "E": np.zeros(LANES, bool)}[how[0]]
            value = strict | ((x == y) & below)
        else:
            value = {
                "GE": x >= y, "GT": x > y, "LE": x <= y, "LT": x < y, "EQ": x == y, "NE": x != y,
            }[how]  # fmt: skip
        other = w.guard(inputs[0])
        results = [value | other, ~value | other] if either else [value & other, ~value & other]
        w.write_predicate(first, results[0], m)
        w.write_predicate(second, results[1], m)

    return step


def _select(i: Instruction) -> Step:  # SEL, VIMNMX, VIADDMNMX
    o = split(i)
    unsigned = ".U32" in i.name
    *added, b = o.sources  # VIADDMNMX adds two before it compares

    def step(w: Warp, m: np.ndarray) -> None:
        condition = w.guard(o.predicates_in[0])
        total = sum((a.integer(w) for a in added), np.zeros(LANES, np.uint64))
        x, y = (value & MASK for value in (total, b.integer(w)))
        if i.kind != "SEL":
            below = np.uint64(0 if unsigned else 1 << 31)  # signed numbers, moved up, keep order
            condition = ((x ^ below) < (y ^ below)) == condition
        w.write(o.out, np.where(condition, x, y), m)

    return step


def _permute(i: Instruction) -> Step:  # PRMT
    o = split(i)
    a, selector, b = o.sources

    def step(w: Warp, m: np.ndarray) -> None:
        pair = a.raw(w).astype(np.uint64) | b.raw(w).astype(np.uint64) << 32
        chosen, value = selector.raw(w).astype(np.uint64), np.zeros(LANES, np.uint64)
        for byte in range(4):
            nibble = chosen >> np.uint64(4 * byte) & np.uint64(15)
            x = pair >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(255)
            sign = np.where(x >= 128, np.uint64(255), np.uint64(0))
            value |= np.where(nibble >= 8, sign, x) << np.uint64(8 * byte)
        w.write(o.out, value, m)

    return step


def _predicates_from(i: Instruction) -> Step:  # R2P PR, R1.B2, 0x30
    source, bits = Source(i.operands[1]), int(i.operands[2], 16)
    shift = 8 * int(source.part[1:] or 0)

    def step(w: Warp, m: np.ndarray) -> None:
        value = source.raw(w) >> np.uint32(shift)
        for p in range(7):
            if bits >> p & 1:
                w.write_predicate(p, (value >> np.uint32(p) & 1).astype(bool), m)

    return step


def _predicates_to(i: Instruction) -> Step:  # P2R R1, PR, RZ, 0x10
    out, rest, bits = register(i.operands[0]), Source(i.operands[2]), int(i.operands[3], 16)

    def step(w: Warp, m: np.ndarray) -> None:
        value = rest.raw(w) & np.uint32(~bits & 0xFFFFFFFF)
        for p in range(7):
            if bits >> p & 1:
                value = value | w.predicates[p].astype(np.uint32) << np.uint32(p)
        w.write(out, value, m)

    return step


def _to_uniform(i: Instruction) -> Step:  # R2UR
    out, source = register(i.operands[0]), Source(i.operands[1])
    return lambda w, m: w.write(out, np.full(LANES, source.raw(w)[m][0]), ALL) if m.any() else None


def _vote(i: Instruction) -> Step:  # VOTEU.ALL UP0, P2; VOTE.ANY R4, PT, P0
    *registers, out, source = i.operands
    every = i.name.endswith(".ALL")

    def step(w: Warp, m: np.ndarray) -> None:
        taking_part = w.guard(source) & m
        voted = (taking_part == m).all() if every else taking_part.any()
        mask = ALL if i.kind == "VOTEU" else m
        w.write_predicate(predicate(out), np.full(LANES, voted), mask)
        for name in registers:
            ballot = sum(1 << int(lane) for lane in np.flatnonzero(taking_part))
            w.write(register(name), np.full(LANES, ballot), mask)

    return step


def _shuffle(i: Instruction) -> Step:  # SHFL.IDX PT, R1, R2, 0x3, 0x1f
    kind = i.name.partition(".")[2]
    if kind not in ("IDX", "BFLY") or i.operands[0] != "PT" or i.operands[4] != "0x1f":
        raise UnknownInstruction("a shuffle of another kind")
    out, source, lane = register(i.operands[1]), Source(i.operands[2]), Source(i.operands[3])

    def step(w: Warp, m: np.ndarray) -> None:
        at = lane.raw(w).astype(np.int64) & 31
        at = at if kind == "IDX" else at ^ np.arange(LANES)
        if not m[at[m]].all():
            raise RuntimeError("a shuffle reads a lane that takes no part")
        w.write(out, source.raw(w)[at], m)

    return step


# -- memory -------------------------------------------------------------------------------------

_ADDRESS = re.compile(r"(?:desc\[UR\d+\])?\[([^\]]*)\]")


class _Address:
    """`[R1+UR2+0x10]` of shared memory, `desc[UR8][R2.64+0x4]` of global memory."""

    def __init__(self, text: str) -> None:
        match = _ADDRESS.fullmatch(text)
        if match is None:
            raise UnknownInstruction(f"the address {text}")
        self.is_global = text.startswith("desc")
        self.sources, self.offset = [], 0
        for part in match[1].split("+"):
            if re.fullmatch(r"-?0x[0-9a-f]+", part):
                self.offset += int(part, 16)
            elif part:
                self.sources.append(Source(part))

    def of(self, warp: Warp) -> np.ndarray:
        total = np.full(LANES, self.offset, np.int64)
        for source in self.sources:
            value = source.wide(warp) if self.is_global else source.raw(warp)
            total = total + value.astype(np.int64)
        return total.astype(np.uint64)


def _access_bytes(name: str) -> int:
    for modifier, size in (("U8", 1), ("U16", 2), ("64", 8), ("128", 16)):
        if f".{modifier}" in name:
            return size
    return 4


def _words(w: Warp, m: np.ndarray, address: _Address, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The memory as words of up to 4 bytes, and where in it the lanes of `m` begin."""
    space, unit, at = w.memory if address.is_global else w.shared, min(size, 4), address.of(w)[m]
    w.words(space, at, size)  # the whole access is inside the memory, and aligned
    return space.view(f"u{unit}"), w.words(space, at, unit)


def _load(i: Instruction) -> Step:  # LDG, LDS
    out, address, size = register(i.operands[0]), _Address(i.operands[1]), _access_bytes(i.name)

    def step(w: Warp, m: np.ndarray) -> None:
        if not m.any():
            return
        words, at = _words(w, m, address, size)
        for word in range(max(1, size // 4)):
            value = np.zeros(LANES, np.uint32)
            value[m] = words[at + word]
            if out not in (RZ, URZ):
                w.write(out + word, value, m)

    return step


def _store(i: Instruction) -> Step:  # STG, STS
    address, source, size = _Address(i.operands[0]), Source(i.operands[1]), _access_bytes(i.name)

    def step(w: Warp, m: np.ndarray) -> None:
        if not m.any():
            return
        words, at = _words(w, m, address, size)
        for word in range(max(1, size // 4)):
            zero = source.register in (RZ, URZ)
            value = source.raw(w) if zero else w.registers[source.register + word]
            words[at + word] = value[m].astype(words.dtype)

    return step


def _copy(i: Instruction) -> Step:  # LDGSTS: global to shared memory
    to, source, size = _Address(i.operands[0]), _Address(i.operands[1]), _access_bytes(i.name)
    wanted = i.operands[2] if len(i.operands) > 2 else "PT"  # if not, zeros and no read

    def step(w: Warp, m: np.ndarray) -> None:
        zeros = m & ~w.guard(wanted)
        if zeros.any():
            first = w.words(w.shared, to.of(w)[zeros], 4)
            for word in range(size // 4):
                w.shared.view(np.uint32)[first + word] = 0
        m = m & ~zeros
        if not m.any():
            return
        w.words(w.memory, source.of(w)[m], size), w.words(w.shared, to.of(w)[m], size)
        read = w.words(w.memory, source.of(w)[m], 4)
        written = w.words(w.shared, to.of(w)[m], 4)
        for word in range(size // 4):
            w.shared.view(np.uint32)[written + word] = w.memory.view(np.uint32)[read + word]

    return step


_FAMILIES: dict[str, Callable[[Instruction], Step]] = {
    "U?MOV": _move,
    "U?LDC": _constant,
    "S2R|S2UR|CS2R": _special,
    "U?IADD3|VIADD": _add,
    "U?IMAD": _multiply_add,
    "U?LEA": _scaled_add,
    "U?LOP3": _logic,
    "U?PLOP3": _logic_of_predicates,
    "U?SHF": _shift,
    "U?ISETP": _compare,
    "FSETP": reals.compare_reals,
    "U?SEL|VIMNMX|VIADDMNMX": _select,
    "U?PRMT": _permute,
    "R2P": _predicates_from,
    "P2R": _predicates_to,
    "R2UR": _to_uniform,
    "VOTEU?": _vote,
    "SHFL": _shuffle,
    "FADD|FMUL|FFMA|HADD2": reals.real,
    "HFMA2": reals.two_halves,
    "HMMA": reals.sparse_matrices,
    "F2FP": reals.pack,
    "I2F|F2I|MUFU": reals.convert,
    "LDG|LDS": _load,
    "STG|STS": _store,
    "LDGSTS": _copy,
}
