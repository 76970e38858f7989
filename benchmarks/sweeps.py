"""The points of `python -m benchmarks --full`: one axis at a time around the setting.

Every op and the training step, at several shares of visible blocks, channels, block sides, batches,
dtypes and threads. A point is a case of its own, `sweep/OP/AXIS=VALUE`, and `sweep/OP/centre` is
where the axes cross; `Case.at` has the sizes as numbers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks import models, work
from benchmarks.cases import Sizes
from benchmarks.limits import clock_for
from benchmarks.networks import BLOCK, Layer
from benchmarks.registry import CASES, Case
from benchmarks.runner import Comparison, Contender
from convmae_kernels import BlockMask
from convmae_kernels.ops import reference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from benchmarks.setting import Setting

PREFIX = "sweep/"
SIDE = 4  # positions in a row of a block, at the centre
CHANNELS_OF_GROUP = 16  # of the grouped convolution
STEP_BATCH = 2  # images of the step at the centre, at most: it takes seconds

# Values besides those of the centre. `quick` has the second of each pair.
SHARES = ((0.05, 0.1, 0.25, 0.5, 0.75, 1.0), (0.1, 0.25, 0.5, 1.0))
CHANNELS = ((64, 128, 256, 512), (64,))
SIDES = ((2, 4, 8), (2,))
BATCHES = ((1, 8, 32), (1,))
MASK_BATCHES = ((8, 32, 128, 512), (8, 128))
STEP_SHARES = ((0.1, 0.25, 0.5, 0.75, 0.95), (0.1, 0.25, 0.5, 0.95))
STEP_BATCHES = ((1, 2, 4), (1,))
MEMORY_SHARES = (0.1, 0.25, 0.5)


@dataclass(frozen=True)
class Point:
    """The sizes of one measurement.

    Attributes:
        visible: share of visible blocks.
        batch: images.
        dtype: of the features; autocast's for the step.
        threads: CPU threads.
        channels, side: of a feature map and its blocks; None where an op has none.
    """

    visible: float
    batch: int
    dtype: torch.dtype
    threads: int
    channels: int | None = None
    side: int | None = None


@dataclass(frozen=True)
class Sweep:
    """An op and the axes along which it is measured.

    Attributes:
        op: its name.
        about: one line about it.
        build: makes the comparison of a point, in a setting of the point's batch.
        centre: where the axes cross.
        axes: values by the name of a field of `Point`.
        emulated: see `Case`.
    """

    op: str
    about: str
    build: Callable[[Setting, Point], Comparison]
    centre: Point
    axes: dict[str, Sequence[Any]] = field(default_factory=dict)
    emulated: bool = True

    def cases(self, setting: Setting) -> Iterator[Case]:
        """The centre, then every other point; compiled opponents are measured at the centre."""
        yield self._case(setting, "centre", self.centre)
        own = replace(setting, compile=False, compile_models=False, compile_blocks=False)
        for axis, values in self.axes.items():
            for value in values:
                point = replace(self.centre, **{axis: value})
                if point != self.centre:
                    yield self._case(own, axis, point)

    def _case(self, setting: Setting, axis: str, point: Point) -> Case:
        value = getattr(point, axis, None)
        text = f"{value:.2f}" if axis == "visible" else str(value).removeprefix("torch.")
        at = {
            "op": self.op,
            "axis": axis,
            **{key: v for key, v in vars(point).items() if v is not None and key != "dtype"},
        }

        def build(_: Setting, dtype: torch.dtype) -> Comparison:
            return self.build(replace(setting, batch_size=point.batch), point)

        name = f"{PREFIX}{self.op}/{axis if axis == 'centre' else f'{axis}={text}'}"
        own = (point.dtype,)
        return Case(name, self.about, build, self.emulated, own, point.threads, at)


def cases(setting: Setting, dtypes: Sequence[torch.dtype], quick: bool = False) -> list[Case]:
    """All points around a setting.

    Args:
        setting: model, batch, size of images, share of hidden blocks at the centre.
        dtypes: that of the centre, then the others.
        quick: fewer ops and values.
    """
    around = _Around(setting, dtypes, quick)
    sweeps = [*around.operators(), *around.masks(), *around.models()]
    return [case for sweep in sweeps for case in sweep.cases(setting)]


def _thread_counts(setting: Setting) -> list[int]:
    """1, 2, 4 ... and all that the run has; on a GPU they matter for nothing."""
    most = torch.get_num_threads()
    if setting.device.type != "cpu":
        return [most]
    most = max(most, os.cpu_count() or 1)
    return sorted({2**i for i in range(most.bit_length()) if 2**i < most} | {most})


def _shares(blocks: int, shares: Sequence[float]) -> list[float]:
    """The shares that whole blocks make, at least one block."""
    return [max(1, round(blocks * share)) / blocks for share in shares]


def _first_line(build: Callable[..., Comparison]) -> str:
    return (build.__doc__ or "").splitlines()[0]


class _Around:
    """Sweeps of everything around a setting."""

    def __init__(self, setting: Setting, dtypes: Sequence[torch.dtype], quick: bool) -> None:
        self.setting, self.dtypes, self.quick = setting, dtypes, quick
        self.threads = torch.get_num_threads()
        self.blocks = setting.grid[0] * setting.grid[1]
        self.keep = int(self.blocks * (1 - setting.mask_ratio))

    def operators(self) -> Iterator[Sweep]:
        """Gathering, scattering and convolutions, each along every axis."""
        yield self._of_map("depthwise5x5/forward_backward", "depthwise/stage1/forward_backward")
        yield self._of_map("gather", "gather/stage1")
        yield self._of_layer("dense3x3/forward_backward", 128)
        if not self.quick:
            yield self._of_map("depthwise5x5/forward", "depthwise/stage1/forward")
            yield self._of_map("depthwise7x7/forward_backward", "depthwise/7x7/forward_backward")
            yield self._of_map("depthwise7x7/forward", "depthwise/7x7/forward")
            yield self._of_map("scatter", "scatter/stage1")
            yield self._of_layer("grouped3x3/forward_backward", 256, CHANNELS_OF_GROUP)

    def _of_map(self, op: str, case: str) -> Sweep:
        """An op on feature maps of ConvMAE; the channels at the centre are those of stage 1."""

        def build(own: Setting, point: Point) -> Comparison:
            assert point.side is not None and point.channels is not None
            sizes = Sizes(point.side, point.channels, point.visible)
            return CASES[case].build(own, point.dtype, stage=sizes)

        channels = models.widths(self.setting.model)[0]
        return self._operator(op, CASES[case], build, self.blocks, channels)

    def _of_layer(self, op: str, channels: int, of_group: int | None = None) -> Sweep:
        """A 3x3 convolution with blocks of 32 pixels, of groups of `of_group` channels if given."""
        case = CASES["layer/conv3x3/128"]

        def build(own: Setting, point: Point) -> Comparison:
            assert point.side is not None and point.channels is not None
            groups = 1 if of_group is None else point.channels // of_group
            shape = Layer(point.channels, point.channels, 3, 7 * point.side, groups=groups)
            return case.build(own, point.dtype, shape=shape, visible=point.visible)

        return self._operator(op, case, build, (self.setting.img_size // BLOCK) ** 2, channels)

    def _operator(
        self,
        op: str,
        case: Case,
        build: Callable[[Setting, Point], Comparison],
        blocks: int,
        channels: int,
    ) -> Sweep:
        (visible,) = _shares(blocks, [1 - self.setting.mask_ratio])
        batch = self.setting.batch_size
        centre = Point(visible, batch, self.dtypes[0], self.threads, channels, SIDE)
        axes = {
            "visible": _shares(blocks, SHARES[self.quick]),
            "channels": CHANNELS[self.quick],
            "side": SIDES[self.quick],
            "batch": BATCHES[self.quick],
            "dtype": self.dtypes,
            "threads": _thread_counts(self.setting),
        }
        return Sweep(op, case.about, build, centre, axes, case.emulated)

    def masks(self) -> Iterator[Sweep]:
        """The construction of masks and of their tables of neighbours, at several batches."""
        batch = self.setting.batch_size
        centre = Point(self.keep / self.blocks, batch, self.dtypes[0], self.threads)
        axes: dict[str, Sequence[Any]] = {"batch": MASK_BATCHES[self.quick]}
        builders = {"from_noise": CASES["mask"].build}
        if not self.quick:
            builders |= {"random": random_mask, "neighbours": neighbours}
        for name, build in builders.items():
            about = CASES["mask"].about if name == "from_noise" else _first_line(build)
            yield Sweep(
                f"mask/{name}", about, lambda s, p, build=build: build(s, p.dtype), centre, axes
            )

    def models(self) -> Iterator[Sweep]:
        """The training step, the convolutions of its encoder, and the step's memory."""
        batch = min(self.setting.batch_size, 1 if self.quick else STEP_BATCH)
        centre = Point(self.keep / self.blocks, batch, self.dtypes[0], self.threads)

        def build(own: Setting, point: Point, case: str) -> Comparison:
            # Half a block more: `int(blocks * (1 - ratio))` is then the number that is meant.
            ratio = 1 - (round(point.visible * self.blocks) + 0.5) / self.blocks
            return CASES[case].build(replace(own, mask_ratio=ratio), point.dtype)

        def sweep(case: str, **axes: Sequence[Any]) -> Sweep:
            return Sweep(case, CASES[case].about, partial(build, case=case), centre, axes)

        shares = _shares(self.blocks, STEP_SHARES[self.quick])
        yield sweep(
            "step",
            visible=shares,
            batch=STEP_BATCHES[self.quick],
            dtype=self.dtypes,
            threads=_thread_counts(self.setting),
        )
        yield sweep("stages12", visible=shares)
        if not self.quick:
            yield sweep("memory", visible=_shares(self.blocks, MEMORY_SHARES))


# -- cases that are none of their own -------------------------------------------------------------


def random_mask(setting: Setting, dtype: torch.dtype) -> Comparison:
    """`BlockMask.random`, against PyTorch's noise and the argsorts that MAE masks with."""
    grid, length = setting.grid, setting.grid[0] * setting.grid[1]
    size, keep = (setting.batch_size, length), int(length * (1 - setting.mask_ratio))
    generator = torch.Generator(setting.device)

    def packed() -> Tensor:
        seeded = generator.manual_seed(0)
        mask = BlockMask.random(setting.batch_size, grid, setting.mask_ratio, seeded)
        return 1 - mask.visible.flatten(1).float()

    def dense() -> Tensor:
        noise = torch.rand(size, generator=generator.manual_seed(0), device=setting.device)
        mask = torch.ones_like(noise)
        mask[:, :keep] = 0
        return mask.gather(1, noise.argsort(dim=1).argsort(dim=1))

    contenders = [Contender(f.__name__, f, lambda mask: [mask]) for f in (packed, dense)]
    counted = work.mask_work(setting.block_mask())
    return Comparison(contenders, counted, clock_for(setting.device))


def neighbours(setting: Setting, dtype: torch.dtype) -> Comparison:
    """The table of 5 x 5 neighbouring blocks, against plain PyTorch."""
    mask, radius = setting.block_mask(), 2

    def packed() -> Tensor:
        return mask.neighbours(radius)

    def dense() -> Tensor:
        return reference.neighbour_table(mask.visible, mask.block_index, radius)

    contenders = [Contender(f.__name__, f, lambda table: [table]) for f in (packed, dense)]
    counted = work.Work(mask.num_blocks + mask.num_visible * (8 + (2 * radius + 1) ** 2 * 4))
    return Comparison(contenders, counted, clock_for(setting.device))
