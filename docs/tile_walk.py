"""A tiled kernel of the convolution, as compiled for sm_90, run on the CPU over a few tiles.

    problem = tile_walk.problem("masked_conv2d_tiles<bfloat16, 4, 5>", visible)
    instructions = problem.run(code)         # code: of that kernel, from `sass.functions`
    problem.output()                         # what the kernel wrote

`visible[t, n]`: whether tile t sees the n-th tile of its surroundings.
"""

from __future__ import annotations

import ctypes
import re
from typing import NamedTuple

import numpy as np

from docs import sass

DTYPES = ["float", "bfloat16", "half"]  # as DType of csrc/numbers.h counts them
_ROOM = 1 << 17  # bytes for each array


class Params(ctypes.Structure):
    """MaskedConv2dForward or MaskedConv2dWeightGrad of csrc/masked_conv2d.h.

    `pointers` are weight, bias and y; or grad, partial and the gradients of weight and bias.
    """

    _fields_ = (
        ("dtype", ctypes.c_int),
        ("x", ctypes.c_uint64),
        ("neighbours", ctypes.c_uint64),
        *((name, ctypes.c_int64) for name in ("blocks", "channels", "table_columns")),
        *((name, ctypes.c_int) for name in ("side", "radius", "kernel_rows", "kernel_columns")),
        *((name, ctypes.c_int) for name in ("dilation_rows", "dilation_columns")),
        *((name, ctypes.c_int64) for name in ("tiles", "tiles_per_run", "runs", "slices")),
        ("tile_side", ctypes.c_int),
        ("log_tiles", ctypes.c_int),
        ("wide", ctypes.c_bool),
        ("pointers", ctypes.c_uint64 * 4),
    )


class Shape(NamedTuple):
    """What a tiled kernel is compiled for."""

    reduces: bool  # the weight gradient
    dtype: str
    side: int  # of a tile
    kernel: int
    tensor: bool = False  # tensor cores: groups of eight tiles

    @classmethod
    def of(cls, name: str) -> Shape:
        """From a kernel's name, such as `masked_conv2d_tiles<bfloat16, 4, 5>`."""
        if match := re.fullmatch(r"masked_conv2d_tensor<(\w+)>", name):
            return cls(False, match[1], 4, 7, True)
        match = re.fullmatch(r"masked_conv2d(_weight_grad)?_tiles<(\w+), (\d), (\d)>", name)
        if match is None:
            raise ValueError(f"{name!r} is no tiled kernel")
        return cls(match[1] is not None, match[2], int(match[3]), int(match[4]))

    @property
    def reach(self) -> int:
        """How many tiles the kernel sees in each direction."""
        return -(-(self.kernel // 2) // self.side)

    @property
    def neighbours(self) -> int:
        return (2 * self.reach + 1) ** 2

    @property
    def channels(self) -> int:
        """Of one thread block: 128 bytes of them, with tensor cores 64."""
        return 32 if self.dtype == "float" or self.tensor else 64


class Problem:
    """One run over some tiles of 128 bytes of channels, with random features and weights.

    Args:
        name: of the kernel.
        visible: bool [tiles, neighbours].
        warps: of the thread block. They share the tiles.
        alone: the first warp takes all of them.
    """

    def __init__(self, name: str, visible: np.ndarray, warps: int = 1, alone: bool = False) -> None:
        self.warps = warps
        self.shape = shape = Shape.of(name)
        tiles, channels, taps = len(visible), shape.channels, shape.kernel**2
        rng = np.random.default_rng(0)
        self.table = np.where(visible, rng.integers(tiles, size=visible.shape), -1).astype(np.int32)
        self.table[:, shape.neighbours // 2] = np.arange(tiles)  # a tile sees itself
        features = (tiles, shape.side**2, channels)
        self.x, self.grad = (rng.standard_normal(features).astype(np.float32) for _ in range(2))
        self.weight = rng.standard_normal((channels, taps)).astype(np.float32)
        self.bias = rng.standard_normal(channels).astype(np.float32)
        self.memory = np.full(8 * _ROOM, 0xFF, np.uint8)
        self._next = 0
        params = Params(
            dtype=DTYPES.index(shape.dtype),
            x=self._put(self._encode("x")),
            neighbours=self._put(self.table),
            blocks=tiles,
            channels=channels,
            table_columns=shape.neighbours,
            side=shape.side,
            radius=shape.reach,
            kernel_rows=shape.kernel,
            kernel_columns=shape.kernel,
            dilation_rows=1,
            dilation_columns=1,
            tiles=tiles,
            tiles_per_run=tiles * warps if alone else tiles,
            runs=1,
            slices=1,
            tile_side=shape.side,
            log_tiles=0,
            wide=True,
        )
        if shape.reduces:
            pointers = [self._put(self._encode("grad"))]
        else:
            pointers = [self._put(self._encode("weight")), self._put(self._encode("bias"))]
        self._output = self._next
        pointers.append(sass.MEMORY_BASE + self._output)
        params.pointers = (ctypes.c_uint64 * 4)(*pointers)
        self.params = bytes(params)

    def run(self, code: list[sass.Instruction]) -> list[sass.Warp]:
        """The warps of the thread block, after all have run."""
        warps = [sass.Warp(code, self.params, self.memory, row=row) for row in range(self.warps)]
        sass.run_block(warps)
        return warps

    def output(self) -> np.ndarray:
        """float32: y, like x; or the sums of bias and taps, [1 + taps, channels]."""
        memory = self.memory[self._output : self._output + _ROOM]
        if self.shape.reduces:
            rows = 1 + self.shape.kernel**2
            return memory.view(np.float32)[: rows * self.shape.channels].reshape(rows, -1)
        kind = np.float32 if self.shape.dtype == "float" else np.uint16
        return self._decode(memory.view(kind)[: self.x.size]).reshape(self.x.shape)

    def _encode(self, name: str) -> np.ndarray:
        """The bits of one of the arrays in the kernel's type; the array is rounded to them."""
        values = getattr(self, name)
        if self.shape.dtype == "float":
            return values
        bits = values.astype(np.float16).view(np.uint16)
        if self.shape.dtype == "bfloat16":
            bits = (values.view(np.uint32) >> 16).astype(np.uint16)
        setattr(self, name, self._decode(bits))
        return bits

    def _decode(self, bits: np.ndarray) -> np.ndarray:
        if self.shape.dtype == "float":
            return bits
        if self.shape.dtype == "half":
            return bits.view(np.float16).astype(np.float32)
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def _put(self, values: np.ndarray) -> int:
        """Copies an array to the next part of memory; returns its address."""
        if values.nbytes > _ROOM:
            raise ValueError(f"{values.nbytes} bytes, expected at most {_ROOM}")
        at, self._next = self._next, self._next + _ROOM
        self.memory[at : at + values.nbytes] = np.frombuffer(values.tobytes(), np.uint8)
        return sass.MEMORY_BASE + at


class Counts(NamedTuple):
    """Warp instructions for one tile that sees only itself, for one that sees all; for a run."""

    alone: float
    all: float
    once: float

    def expected(self, visible: float) -> float:
        """For a tile each of whose neighbours is visible with this probability."""
        return self.alone + visible * (self.all - self.alone)


def count(name: str, code: list[sass.Instruction], warps: int, *kinds: str) -> Counts:
    """What a warp issues: all instructions, or those of some kinds (`FFMA`).

    Args:
        name: of the kernel.
        code: its instructions.
        warps: of its thread blocks.
        kinds: what to count; none: everything.

    Raises:
        RuntimeError: the cost of a tile is not, to 1 %, the sum of what its neighbours cost, so
            that `Counts.expected` would be wrong.
    """
    if Shape.of(name).tensor:
        return _count_groups(name, code, warps, *kinds)
    neighbours = Shape.of(name).neighbours
    alone = np.zeros((neighbours + 4, neighbours), bool)
    one = np.eye(neighbours, dtype=bool)

    def issued(visible: np.ndarray) -> int:
        warp = Problem(name, visible, warps, alone=True).run(code)[0]
        return warp.count(*kinds) if kinds else sum(warp.issued)

    few, many = issued(alone[:4]), issued(alone)
    tile = (many - few) / neighbours
    more = (issued(~alone[:4]) - few) / 4
    one_each = issued(np.concatenate([alone[:4], one])) - many
    if abs(one_each - more) > 0.01 * (tile + more):
        raise RuntimeError(
            f"{name}: neighbours cost {one_each} instructions one by one, but {more} together"
        )
    return Counts(tile, tile + more, few - 4 * tile)


def _count_groups(name: str, code: list[sass.Instruction], warps: int, *kinds: str) -> Counts:
    """`count` where eight tiles are computed at a time, by all warps of a thread block.

    What all of them issue counts, twice, because it is for 64 bytes of channels.
    """
    neighbours = Shape.of(name).neighbours

    def issued(visible: np.ndarray) -> float:
        run = Problem(name, visible, warps).run(code)
        return 2 * sum(warp.count(*kinds) if kinds else sum(warp.issued) for warp in run)

    alone = np.zeros((48, neighbours), bool)
    around = np.arange(neighbours) != neighbours // 2
    some = np.random.default_rng(0).random((32, neighbours)) < 0.4
    few = issued(alone[:16])
    tile = (issued(alone) - few) / 32
    once = few - 16 * tile
    more = (issued(~alone) - once) / 48 - tile
    found = (issued(np.concatenate([alone[:16], some])) - few) / 32
    expected = tile + more * some[:, around].mean()
    if abs(found - expected) > 0.02 * expected:
        raise RuntimeError(f"{name}: {found} instructions for a tile, but {expected} by neighbours")
    return Counts(tile, tile + more, once)
