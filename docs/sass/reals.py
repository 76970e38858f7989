"""What the instructions on floating-point numbers do."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from docs.sass.operands import LANES, Source, split
from docs.sass.text import RZ, Instruction, UnknownInstruction, predicate, register

if TYPE_CHECKING:
    from docs.sass.warp import Warp

Step = Callable[["Warp", np.ndarray], None]  # one instruction on the lanes that take part


def compare_reals(i: Instruction) -> Step:  # FSETP.NEU.AND P0, PT, R1, RZ, PT
    if i.name != "FSETP.NEU.AND" or i.operands[1] != "PT":
        raise UnknownInstruction("a comparison of another kind")
    out, a, b = predicate(i.operands[0]), Source(i.operands[2]), Source(i.operands[3])
    last = i.operands[4]
    return lambda w, m: w.write_predicate(out, (a.real(w) != b.real(w)) & w.guard(last), m)


def real(i: Instruction) -> Step:  # FADD, FMUL, FFMA, HADD2.F32
    out, sources = register(i.operands[0]), [Source(text) for text in i.operands[1:]]

    def step(w: Warp, m: np.ndarray) -> None:
        with np.errstate(all="ignore"):  # what a lane holds that takes no part may be anything
            values = [s.real(w).astype(np.float64) for s in sources]
            if i.kind == "FFMA":
                value = values[0] * values[1] + values[2]
            else:
                value = values[0] * values[1] if i.kind == "FMUL" else values[0] + values[1]
            w.write(out, value.astype(np.float32).view(np.uint32), m)

    return step


def two_halves(i: Instruction) -> Step:  # HFMA2.MMA R1, -RZ, RZ, 0, 1e-5: two numbers
    zero = i.operands[1].endswith("RZ") and i.operands[2].endswith("RZ")
    if len(i.operands) != 5 or not zero:
        raise UnknownInstruction("arithmetic on halves")
    high, low = (np.float16(float(text)).view(np.uint16) for text in i.operands[3:])
    out, value = register(i.operands[0]), np.full(LANES, int(high) << 16 | int(low))
    return lambda w, m: w.write(out, value, m)


def sparse_matrices(i: Instruction) -> Step:  # HMMA.SP.16832.F32 R4, R8, R12, R4, R16, 0x0
    """Of four elements of a row of the first factor two are there; the metadata says which.

    The metadata must be the same for all rows.
    """
    if not re.fullmatch(r"HMMA\.SP\.16832\.F32(\.BF16)?", i.name) or i.operands[5] != "0x0":
        raise UnknownInstruction("a product of another kind")
    out, a, b, c, chosen = (register(re.sub(r"\.reuse", "", o)) for o in i.operands[:5])
    lane = np.arange(LANES)

    def halves(w: Warp, first: int) -> np.ndarray:
        words = np.ascontiguousarray(w.registers[first : first + 4])
        if ".BF16" not in i.name:
            return words.view(np.float16).reshape(4, 8, 8).astype(np.float64)
        bits = words.view(np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).reshape(4, 8, 8).astype(np.float64)

    def step(w: Warp, m: np.ndarray) -> None:
        if not m.any():
            return
        meta = w.registers[chosen]
        nibble = int(meta[0]) & 15
        if not m.all() or (meta != nibble * 0x11111111).any():
            raise UnknownInstruction("lanes that are not there, or rows that differ")
        left, right = halves(w, a), halves(w, b)  # [word, group, 2 * quad + half]
        x = np.block([[left[0], left[2]], [left[1], left[3]]])  # [16, 16]
        every = right.transpose(0, 2, 1).reshape(32, 8)
        fours = 4 * np.arange(8)[:, None] + [nibble & 3, nibble >> 2]
        with np.errstate(all="ignore"):
            product = x @ every[fours.reshape(16)]
        for word in range(4):
            held = w.registers[c + word].view(np.float32) if c != RZ else np.float32(0)
            value = held + product[lane // 4 + word // 2 * 8, lane % 4 * 2 + word % 2]
            w.write(out + word, value.astype(np.float32).view(np.uint32), m)

    return step


def pack(i: Instruction) -> Step:  # F2FP.BF16.F32.PACK_AB
    o = split(i)
    bfloat = ".BF16" in i.name

    def half(x: np.ndarray) -> np.ndarray:
        if not bfloat:
            return x.astype(np.float16).view(np.uint16).astype(np.uint32)
        bits = x.astype(np.float32).view(np.uint32)  # to nearest, ties to even
        return (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & 1)) >> np.uint32(16)

    def step(w: Warp, m: np.ndarray) -> None:
        a, b = (half(s.real(w)) for s in o.sources)
        w.write(o.out, a << np.uint32(16) | b, m)

    return step


def convert(i: Instruction) -> Step:  # what an integer division uses
    out, source = register(i.operands[0]), Source(i.operands[1])

    def step(w: Warp, m: np.ndarray) -> None:
        if i.name == "I2F.U32.RP":
            exact = source.raw(w).astype(np.float64)
            near = exact.astype(np.float32)
            value = np.where(near < exact, np.nextafter(near, np.float32(np.inf)), near)
            w.write(out, value.astype(np.float32).view(np.uint32), m)
        elif i.name == "MUFU.RCP":
            with np.errstate(divide="ignore"):
                value = (np.float32(1) / source.real(w)).astype(np.float32)
            w.write(out, value.view(np.uint32), m)
        elif i.name == "F2I.FTZ.U32.TRUNC.NTZ":
            w.write(out, np.minimum(source.real(w), np.float32(2**32 - 256)).astype(np.uint64), m)
        else:
            raise UnknownInstruction(f"{i}")

    return step
