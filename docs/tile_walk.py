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
_ROOM = 1 << 18  # bytes for each array


class Params(ctypes.Structure):
    """MaskedConv2dForward, MaskedConv2dWeightGrad or MaskedConv2dGrads of csrc/masked_conv2d.h.

    `rest` are weight, bias and y; or the number of shares, grad, partial and the gradients of
    weight and bias, and for all gradients at once weight and the gradient of x.
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
        ("kernel", ctypes.c_int),
        ("wide", ctypes.c_bool),
        ("flipped", ctypes.c_bool),
        ("rest", ctypes.c_uint64 * 7),
    )


class Shape(NamedTuple):
    """What a tiled kernel is compiled for."""

    op: str  # "" (forward), "_weight_grad" or "_grads"
    dtype: str
    side: int  # of a tile
    kernel: int
    tensor: bool = False  # tensor cores: groups of eight tiles

    @classmethod
    def of(cls, name: str) -> Shape:
        """From a kernel's name, such as `masked_conv2d_tiles<bfloat16, 4, 5>`."""
        if match := re.fullmatch(r"masked_conv2d_tensor<(\w+)>", name):
            return cls("", match[1], 4, 7, True)
        match = re.fullmatch(r"masked_conv2d(|_weight_grad|_grads)_tiles<(\w+), (\d), (\d)>", name)
        if match is None:
            raise ValueError(f"{name!r} is no tiled kernel")
        return cls(match[1], match[2], int(match[3]), int(match[4]))

    @property
    def step(self) -> int:
        """How far apart the tiles of a warp are: the warps of csrc/cuda/tile_memory.h."""
        return {4: 8, 2: 4}[self.side] if self.op == "_grads" else 1

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
        reach: how far a tile is from those that it sees, at most.
    """

    def __init__(
        self,
        name: str,
        visible: np.ndarray,
        warps: int = 1,
        alone: bool = False,
        reach: int = 8,
    ) -> None:
        self.warps = warps
        self.shape = shape = Shape.of(name)
        if alone:
            visible = np.repeat(visible, shape.step, 0)
        tiles, channels, taps = len(visible), shape.channels, shape.kernel**2
        rng = np.random.default_rng(0)
        near = np.arange(tiles)[:, None] + rng.integers(-reach, reach + 1, size=visible.shape)
        self.table = np.where(visible, np.clip(near, 0, tiles - 1), -1).astype(np.int32)
        self.table[:, shape.neighbours // 2] = np.arange(tiles)  # a tile sees itself
        features = (tiles, shape.side**2, channels)
        self.x, self.grad = (rng.standard_normal(features).astype(np.float32) for _ in range(2))
        self.weight = rng.standard_normal((channels, taps)).astype(np.float32)
        self.bias = rng.standard_normal(channels).astype(np.float32)
        self.memory = np.full(8 * _ROOM, 0xFF, np.uint8)
        self._next = 0
        self.shares = shape.step // warps if shape.op == "_grads" and not alone else 1
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
            kernel=1,
            wide=True,
            flipped=False,
        )
        weight, output = self._put(self._encode("weight")), self._room()
        rest = [weight, self._put(self._encode("bias")), output]
        self._outputs = [output]
        if shape.op:
            rest = [self.shares, self._put(self._encode("grad")), output, 0, 0]
        if shape.op == "_grads":
            self._outputs.append(self._room())
            rest += [weight, self._outputs[1]]
        params.rest = (ctypes.c_uint64 * 7)(*rest)
        self.params = bytes(params)

    def run(self, code: list[sass.Instruction]) -> list[sass.Warp]:
        """The warps of the first thread block, after all have run."""
        blocks = [
            [
                sass.Warp(code, self.params, self.memory, (0, share, 0), row)
                for row in range(self.warps)
            ]
            for share in range(self.shares)
        ]
        for warps in blocks:
            sass.run_block(warps)
        return blocks[0]

    def output(self) -> np.ndarray:
        """float32: y, like x; or the sums of bias and taps, [1 + taps, channels]."""
        if not self.shape.op:
            return self._features(self._outputs[0])
        rows, at = 1 + self.shape.kernel**2, self._outputs[0] - sass.MEMORY_BASE
        memory = self.memory[at : at + _ROOM].view(np.float32)
        size = rows * self.shape.channels
        return memory[: self.shares * size].reshape(self.shares, rows, -1).sum(0)

    def grad_x(self) -> np.ndarray:
        """float32, like x: the other output of `masked_conv2d_grads`."""
        return self._features(self._outputs[1])

    def _features(self, address: int) -> np.ndarray:
        memory = self.memory[address - sass.MEMORY_BASE :][:_ROOM]
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
        at = self._next
        self.memory[at : at + values.nbytes] = np.frombuffer(values.tobytes(), np.uint8)
        return self._room()

    def _room(self) -> int:
        """The address of the next part of memory."""
        at, self._next = self._next, self._next + _ROOM
        return sass.MEMORY_BASE + at


class Counts(NamedTuple):
    """Warp instructions for one tile that sees only itself, for one that sees all; for a run."""

    alone: float
    all: float
    once: float

    def expected(self, visible: float) -> float:
        """For a tile each of whose neighbours is visible with this probability."""
        return self.alone + visible * (self.all - self.alone)


class Walk:
    """What the first warp of a kernel's thread block issues for tiles that see few or many others.

    Args:
        name: of the kernel.
        code: its instructions.
        warps: of its thread blocks.
    """

    def __init__(self, name: str, code: list[sass.Instruction], warps: int) -> None:
        self.name, self.neighbours = name, Shape.of(name).neighbours
        alone = np.zeros((self.neighbours + 4, self.neighbours), bool)
        one = np.eye(self.neighbours, dtype=bool)

        def run(visible: np.ndarray) -> sass.Warp:
            return Problem(name, visible, warps, alone=True).run(code)[0]

        self._few, self._many = run(alone[:4]), run(alone)
        self._all, self._one_each = run(~alone[:4]), run(np.concatenate([alone[:4], one]))

    @property
    def each_tile(self) -> list[sass.Instruction]:
        """Those that are issued for every tile, in the order of the code."""
        pairs = zip(self._few.code, self._few.issued, self._many.issued, strict=True)
        return [instruction for instruction, few, many in pairs if many > few]

    def count(self, *kinds: str) -> Counts:
        """All instructions, or those of some kinds (`FFMA`).

        Raises:
            RuntimeError: the cost of a tile is not, to 1 %, the sum of what its neighbours cost, so
                that `Counts.expected` would be wrong.
        """

        def issued(warp: sass.Warp) -> int:
            return warp.count(*kinds) if kinds else sum(warp.issued)

        few, many = issued(self._few), issued(self._many)
        tile = (many - few) / self.neighbours
        more = (issued(self._all) - few) / 4
        one_each = issued(self._one_each) - many
        if abs(one_each - more) > 0.01 * (tile + more):
            raise RuntimeError(
                f"{self.name}: neighbours cost {one_each} instructions one by one, but {more} "
                "together"
            )
        return Counts(tile, tile + more, few - 4 * tile)


class GroupWalk:
    """What all warps of a thread block issue where eight tiles are computed at a time.

    It counts twice, because it is for 64 bytes of channels.

    Args:
        name: of the kernel.
        code: its instructions.
        warps: of its thread blocks.
    """

    def __init__(self, name: str, code: list[sass.Instruction], warps: int) -> None:
        self.name, neighbours = name, Shape.of(name).neighbours
        alone = np.zeros((48, neighbours), bool)
        around = np.arange(neighbours) != neighbours // 2
        some = np.random.default_rng(0).random((32, neighbours)) < 0.4
        self._visible = some[:, around].mean()

        def run(visible: np.ndarray) -> list[sass.Warp]:
            return Problem(name, visible, warps).run(code)

        self._few, self._many, self._all = run(alone[:16]), run(alone), run(~alone)
        self._some = run(np.concatenate([alone[:16], some]))

    def count(self, *kinds: str) -> Counts:
        """All instructions, or those of some kinds (`HMMA`).

        Raises:
            RuntimeError: the cost of tiles is not, to 2 %, what their neighbours cost.
        """

        def issued(run: list[sass.Warp]) -> int:
            return 2 * sum(warp.count(*kinds) if kinds else sum(warp.issued) for warp in run)

        few = issued(self._few)
        tile = (issued(self._many) - few) / 32
        once = few - 16 * tile
        more = (issued(self._all) - once) / 48 - tile
        found, expected = (issued(self._some) - few) / 32, tile + more * self._visible
        if abs(found - expected) > 0.02 * expected:
            raise RuntimeError(
                f"{self.name}: {found} instructions for a tile, but {expected} by neighbours"
            )
        return Counts(tile, tile + more, once)


def walk(name: str, code: list[sass.Instruction], warps: int) -> Walk | GroupWalk:
    """The walk that fits a kernel; arguments are those of `Walk`."""
    return (GroupWalk if Shape.of(name).tensor else Walk)(name, code, warps)
