"""Times the implementations and kernels that could compute an op, and writes which was fastest.

    python -m convmae_kernels measure --out table.json
    CONVMAE_KERNELS_TABLE=table.json python train.py     # or ck.use_table("table.json")

A candidate that disagrees with the reference, or fails, is reported and left out. The default stays
where nothing else is faster by more than the clock can tell.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from convmae_kernels import ops
from convmae_kernels.block_mask import BlockMask
from convmae_kernels.explain import explain
from convmae_kernels.ops.support import choices, dispatch
from convmae_kernels.ops.support.choices import Choice, Sizes, Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

WORTHWHILE = 0.97  # of the default's time: above that, the default stays
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float64: 1e-9}
FLUSH_BYTES = 256 * 2**20  # written before a timed call on a GPU, so that its cache holds no input
REPEATS = 15  # at most, of a timed call
# Blocks of the stages of ConvMAE, and of a ConvNeXt whose blocks are 32 pixels wide.
DEPTHWISE = [
    Sizes(side, channels, (kernel, kernel), 1, 1)
    for side, all_channels in {4: (128, 256, 512), 2: (256, 384, 768), 8: (96, 128)}.items()
    for channels in all_channels
    for kernel in (3, 5, 7)
]
# Between the stages of a MobileNet or an EfficientNet, dense ones of a ResNet, groups of a ResNeXt.
OTHER_CONVOLUTIONS = [
    *(("strided_conv2d", Sizes(8, 96, (kernel, kernel), 2, 1)) for kernel in (3, 5)),
    ("strided_conv2d", Sizes(4, 240, (3, 3), 2, 1)),
    *(("window_conv2d", Sizes(side, c, (3, 3), 1, c)) for side, c in ((8, 64), (4, 128), (2, 256))),
    ("window_conv2d", Sizes(4, 128, (3, 3), 2, 128)),
    *(("window_conv2d", Sizes(4, c, (3, 3), 1, c // 32)) for c in (256, 512)),
]
MOVES = [
    ("gather_visible", Sizes(16, 3)),
    ("gather_visible", Sizes(4, 256)),
    ("scatter_visible", Sizes(4, 256)),
    ("gather_windows", Sizes(8, 64)),
    ("gather_windows", Sizes(4, 256)),
]


@dataclass(frozen=True)
class Problem:
    """An op, its sizes and its dtype.

    Attributes:
        op: one of `choices.OPS`, timed forward and backward; or a registered op with several
            kernels, and " kernels", timed alone.
    """

    op: str
    sizes: Sizes
    dtype: torch.dtype

    def __str__(self) -> str:
        rows, columns = self.sizes.kernel
        kernel = f", {rows} x {columns}" if rows else ""
        if self.sizes.stride > 1:
            kernel += f", stride {self.sizes.stride}"
        if self.sizes.group_channels > 1:
            kernel += f", {self.sizes.group_channels} channels a group"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op}, {dtype}, side {self.sizes.side}, {self.sizes.channels} channels{kernel}"


def problems(device: torch.device) -> list[Problem]:
    """What is measured, the quickest first: on a GPU kernels, then whatever Triton has to tune."""
    if device.type != "cuda":
        dtypes, kernels = [torch.float32], []
    else:
        dtypes = [torch.bfloat16, torch.float32]
        kernels = [op for op in sorted(dispatch.cuda_ops()) if dispatch.kernels_of(op)]
    depthwise = [Problem("masked_conv2d", sizes, dtype) for dtype in dtypes for sizes in DEPTHWISE]
    return [
        *(Problem(f"{op} kernels", p.sizes, p.dtype) for op in kernels for p in depthwise),
        *(Problem(op, sizes, dtype) for dtype in dtypes for op, sizes in MOVES),
        *depthwise,
        *(Problem(op, sizes, dtype) for dtype in dtypes for op, sizes in OTHER_CONVOLUTIONS),
    ]


class Bench:
    """Random arguments on a device, and its clock."""

    def __init__(self, device: torch.device, batch: int, seconds: float) -> None:
        """Takes images in a batch, and how long one candidate is timed."""
        self.device, self.batch, self.seconds = device, batch, seconds
        self.flush = None
        if device.type == "cuda":
            self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def microseconds(self, run: Callable[[], object]) -> float:
        """The median time of a call."""
        run()
        times: list[float] = []
        end = time.monotonic() + self.seconds
        while len(times) < 3 or (len(times) < REPEATS and time.monotonic() < end):
            times.append(self._once(run))
        return statistics.median(times)

    def _once(self, run: Callable[[], object]) -> float:
        if self.flush is None:
            begin = time.perf_counter()
            run()
            return 1e6 * (time.perf_counter() - begin)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()  # the host is ahead meanwhile, so that launching is not measured
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return 1e3 * start.elapsed_time(stop)

    def mask(self, side: int) -> BlockMask:
        grid = (7, 7) if side >= 8 else (14, 14)
        generator = torch.Generator().manual_seed(0)
        mask = BlockMask.random(self.batch, grid, 0.75, generator)
        return mask.to(self.device)

    def randn(self, dtype: torch.dtype, *shape: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(len(shape))
        values = torch.randn(shape, generator=generator, device=self.device)
        return values.to(dtype)

    def call(self, problem: Problem) -> Callable[[str], Sequence[Tensor]]:
        """What runs an op with an `impl`, forward and backward."""
        (side, channels, kernel, stride, group_channels), dtype = problem.sizes, problem.dtype
        mask = self.mask(side)
        x = self.randn(dtype, mask.num_visible, side * side, channels)
        options: dict[str, Any] = {}
        arguments: list[Any] = [x, mask]
        function: Callable = getattr(ops, problem.op, ops.masked_conv2d)
        if problem.op == "gather_visible":
            gh, gw = mask.grid
            images = self.randn(dtype, self.batch, channels, gh * side, gw * side)
            layout = torch.contiguous_format if channels <= 3 else torch.channels_last
            arguments = [images.contiguous(memory_format=layout), mask]
        elif problem.op == "gather_windows":
            arguments.append((1, 1, 1, 1))
        elif function is ops.masked_conv2d:
            fan_in = group_channels * kernel[0] * kernel[1]
            weight = self.randn(dtype, channels, group_channels, *kernel) / fan_in**0.5
            arguments = [x, weight, self.randn(dtype, channels), mask]
            options = {"groups": channels // group_channels, "stride": stride}
        wanted = [t for t in arguments if isinstance(t, Tensor)]
        if channels > 3:  # pixels have no gradient
            for tensor in wanted:
                tensor.requires_grad_()

        def run(impl: str) -> list[Tensor]:
            y = function(*arguments, impl=impl, **options)
            if not y.requires_grad:
                return [y]
            return [y, *torch.autograd.grad(y, wanted, y.detach())]

        return run

    def kernel_call(self, problem: Problem) -> Callable[[str], Sequence[Tensor]]:
        """What runs a registered op with one of its kernels."""
        (side, channels, kernel, *_), dtype = problem.sizes, problem.dtype
        mask, name = self.mask(side), problem.op.partition(" ")[0]
        x = self.randn(dtype, mask.num_visible, side * side, channels)
        table = mask.neighbours(-(-(max(kernel) // 2) // side))
        weight = self.randn(dtype, channels, 1, *kernel) / (kernel[0] * kernel[1]) ** 0.5
        if "grad" not in name:
            arguments: list[Any] = [x, weight, None, table, [1, 1]]
        elif "weight" in name:
            arguments = [x, x, table, list(kernel), [1, 1]]
        else:
            arguments = [x, x, weight, table, [1, 1]]
        op = getattr(torch.ops.convmae, name)

        def run(kernel_name: str) -> list[Tensor]:
            outputs = op(*arguments)
            return [outputs] if isinstance(outputs, Tensor) else list(outputs)

        return run


def measure(
    device: torch.device,
    wanted: Sequence[Problem],
    batch: int,
    seconds: float,
    limit: float = math.inf,
) -> tuple[Table, list[str]]:
    """Times all candidates of the problems.

    Args:
        device: where.
        wanted: the problems; those that are not begun after `limit` seconds are left out.
        batch: images of a mask.
        seconds: for each candidate, about.
        limit: for all of it.

    Returns:
        The table, whose `where` is empty; and a line for each candidate that was left out.
    """
    bench = Bench(device, batch, seconds)
    kinds: dict[str, list[Choice]] = {"implementations": [], "kernels": []}
    left_out: list[str] = []
    choices.use_table(None)
    end = time.monotonic() + limit
    for i, problem in enumerate(wanted):
        if time.monotonic() > end:
            left_out.append(f"{len(wanted) - i} problems were not reached in {limit:.0f} s")
            break
        kind = "kernels" if problem.op.endswith(" kernels") else "implementations"
        candidates = _kernels if kind == "kernels" else _implementations
        times: dict[str, float] = {}
        try:
            run = (bench.kernel_call if kind == "kernels" else bench.call)(problem)
            expected = None if kind == "kernels" else run("reference")
        except Exception as error:
            left_out.append(f"{problem}: {_short(error)}")
            continue
        for name in candidates(problem, device):
            try:
                found = run(name)
                expected = expected or found
                _check(found, expected, TOLERANCE[problem.dtype])
                times[name] = bench.microseconds(functools.partial(run, name))
            except Exception as error:
                left_out.append(f"{problem}: {name}: {_short(error)}")
        if len(times) > 1:
            kinds[kind].append(_choice(problem, times))
    choices.use_table(None)
    facts = choices.facts_of(device)
    return Table("", facts, tuple(kinds["implementations"]), tuple(kinds["kernels"])), left_out


def _implementations(problem: Problem, device: torch.device) -> list[str]:
    """Those that can run, the default first."""
    probe = torch.zeros(0, device=device)
    order: tuple[dispatch.Impl, ...] = ("cuda", "cpu", "triton")
    found = [name for name in order if dispatch.why_not(name, probe) is None]
    return [*found, "reference"] if device.type == "cpu" else list(found)


def _kernels(problem: Problem, device: torch.device) -> Iterator[str]:
    """Chooses one kernel of the op after the other, the default first; those that can run."""
    name = problem.op.partition(" ")[0]
    default = _planned(problem)
    yield default
    for kernel in dispatch.kernels_of(name):
        if kernel == default:
            continue
        choices.set_kernel(_choice(problem, {kernel: 0.0}))
        try:
            if _planned(problem) == kernel:
                yield kernel
        finally:
            torch.ops.convmae.clear_kernel_choices()


def _planned(problem: Problem) -> str:
    """The kernel that would run now."""
    side, channels, kernel, *_ = problem.sizes
    said = torch.ops.convmae.explain_kernel(
        *(problem.op.partition(" ")[0], str(problem.dtype).removeprefix("torch."), 1000, channels),
        *(side, list(kernel), [1, 1], 0, -1, 132, 102400),
    )
    return dict(line.split("=", 1) for line in said.splitlines())["kernel"]


def _choice(problem: Problem, times: dict[str, float]) -> Choice:
    """The fastest candidate, or the default, which is the first, where that is about as fast."""
    default = next(iter(times))
    best = min(times, key=lambda name: times[name])
    side, channels, kernel, stride, group_channels = problem.sizes
    return Choice(
        op=problem.op.partition(" ")[0],
        dtype=str(problem.dtype).removeprefix("torch."),
        side=side,
        kernel=kernel,
        least=choices.channel_class(channels)[0],
        most=choices.channel_class(channels)[1],
        wide=choices.is_wide(channels, problem.dtype),
        choice=best if times[best] < WORTHWHILE * times[default] else default,
        default=default,
        microseconds={name: round(time, 2) for name, time in times.items()},
        stride=stride,
        group_channels=group_channels,
    )


def _check(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Raises ValueError where results differ by more than rounding."""
    for a, b in zip(found, expected, strict=True):
        a, b = a.detach().double(), b.detach().double()
        error = float((a - b).norm() / b.norm().clamp_min(1e-30))
        if not error <= tolerance:
            raise ValueError(f"a relative error of {error:.1e} against the first, or the reference")


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"


def main(arguments: Sequence[str]) -> None:
    """Measures, writes the table, and shows that it is in use then."""
    parser = argparse.ArgumentParser(prog="python -m convmae_kernels measure")
    parser.add_argument("--out", type=Path, default=Path("convmae_kernels_table.json"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, help="images; 128 on a GPU, else 4")
    parser.add_argument("--seconds", type=float, default=0.1, help="for each candidate, about")
    parser.add_argument("--few", action="store_true", help="the first problems only, to try it out")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds for all of it")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    batch = options.batch or (128 if device.type == "cuda" else 4)
    wanted = problems(device)
    if options.few:
        wanted = [p for p in wanted if p.sizes.side == 4][:4]
    with torch.backends.cudnn.flags(allow_tf32=False):
        table, left_out = measure(device, wanted, batch, options.seconds, options.limit)
    choices.write(options.out, table)
    report(options.out, table, left_out, device)


def report(path: Path, table: Table, left_out: Sequence[str], device: torch.device) -> None:
    """Prints what was found, and last that the table that was written is in use."""
    for line in left_out:
        print(f"left out: {line}")
    chosen = [*table.implementations, *table.kernels]
    for choice in chosen:
        times = ", ".join(f"{name} {us:.1f} us" for name, us in choice.microseconds.items())
        rows, columns = choice.kernel
        print(
            f"{choice.op} {choice.dtype}, side {choice.side}, {choice.least} to {choice.most} "
            f"channels, {choice.group_channels} of a group, {rows} x {columns}, stride "
            f"{choice.stride}: {choice.choice} ({times})"
        )
    choices.use_table(path)
    print(_in_use(chosen, device))


def _in_use(chosen: Sequence[Choice], device: torch.device) -> str:
    """What the table changes, shown on the first problem of a convolution."""
    table = choices.in_use()
    if table is None or not chosen:
        return "the table is empty, or not in use"
    changed = [choice for choice in chosen if choice.choice != choice.default]
    first = next((c for c in [*changed, *chosen] if c.op == "masked_conv2d"), None)
    example = ""
    if first is not None:
        explained = explain(
            "masked_conv2d",
            side=first.side,
            channels=first.most,
            groups=first.most,
            kernel=first.kernel,
            dtype=getattr(torch, first.dtype),
            device=device,
            batch=1,
        )
        step = explained.steps[0]
        example = (
            f"; {first.op}, side {first.side}, {first.most} channels: " + str(step).splitlines()[0]
        )
    counts = f"{len(chosen)} choices, {len(changed)} not the default"
    return f"table in use: {table.where}, {counts}{example}"
