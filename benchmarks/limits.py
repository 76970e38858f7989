"""What this machine can do at best, measured: copy bandwidth and matrix product rate."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import linear

import convmae_kernels
from convmae_kernels.ops.support.arithmetic import SLOW_ON_CPU

Clock = Callable[[Callable[[], object]], tuple[float, object]]

COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}
# (m, k, n) of `[m, k] @ [k, n]`: the MLPs of ConvMAE-Base on a small batch and a square product.
GEMM_SHAPES = {
    "cpu": [(6272, 256, 1024), (392, 768, 3072), (1024, 1024, 1024)],
    "cuda": [(100352, 256, 1024), (25088, 512, 2048), (8192, 8192, 8192)],
}
SECONDS_EACH = 0.3
CUDA_FILL_MS = 3.0


@dataclass(frozen=True)
class Rates:
    """The machine's limits.

    Attributes:
        copy: bytes read plus bytes written in a second by a large copy.
        gemm: FLOPs in a second of the fastest matrix product tried, by dtype.
    """

    copy: float
    gemm: dict[torch.dtype, float]


@contextmanager
def using_threads(number: int | None) -> Iterator[None]:
    """That many CPU threads; no other than there are if None."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def clock_for(device: torch.device) -> Clock:
    """A function that runs another and gives its time in milliseconds and its result."""
    return _cuda_clock if device.type == "cuda" else _wall_clock


def _wall_clock(run: Callable[[], object]) -> tuple[float, object]:
    start = time.perf_counter()
    result = run()
    return 1e3 * (time.perf_counter() - start), result


def _cuda_clock(run: Callable[[], object]) -> tuple[float, object]:
    """Short work is repeated until it fills a few milliseconds, so that its launch is hidden."""
    once, result = _events(run, 1)
    if once >= CUDA_FILL_MS:
        return once, result
    return _events(run, min(200, math.ceil(CUDA_FILL_MS / max(once, 1e-3))))


def _events(run: Callable[[], object], calls: int) -> tuple[float, object]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        result = run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls, result


def _best_seconds(run: Callable[[], object], clock: Clock) -> float:
    """The fastest of at least two calls, after one to warm up."""
    run()
    best, spent, calls = float("inf"), 0.0, 0
    while calls < 2 or spent < SECONDS_EACH:
        seconds = clock(run)[0] / 1e3
        best, spent, calls = min(best, seconds), spent + seconds, calls + 1
    return best


def copy_bandwidth(device: torch.device, num_bytes: int | None = None) -> float:
    """`2 * num_bytes / seconds` of a copy between two buffers much larger than the caches."""
    size = num_bytes or COPY_BYTES[device.type]
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best_seconds(lambda: target.copy_(source), clock_for(device))


def gemm_rate(
    device: torch.device, dtype: torch.dtype, shapes: Sequence[tuple[int, int, int]] | None = None
) -> float:
    """`max over shapes of 2 * m * k * n / seconds` of `torch.nn.functional.linear`."""
    rates = []
    for m, k, n in shapes or GEMM_SHAPES[device.type]:
        x = torch.randn(m, k, device=device, dtype=dtype)
        weight = torch.randn(n, k, device=device, dtype=dtype)
        seconds = _best_seconds(partial(linear, x, weight), clock_for(device))
        rates.append(2 * m * k * n / seconds)
    return max(rates)


def measure_rates(device: torch.device, dtypes: Sequence[torch.dtype]) -> Rates:
    """The machine's limits on a device, for some dtypes.

    A half type that the CPU does not multiply has the rate of float32, in which models multiply it.
    """
    gemm = {}
    for dtype in dtypes:
        slow = device.type == "cpu" and dtype in SLOW_ON_CPU
        gemm[dtype] = gemm_rate(device, torch.float32 if slow else dtype)
    return Rates(copy_bandwidth(device), gemm)


def environment(device: torch.device) -> dict[str, str | int]:
    """What the figures were measured on: device, cores, threads, versions and date (UTC)."""
    facts: dict[str, str | int] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "large_pages": os.environ.get("THP_MEM_ALLOC_ENABLE", "0"),
        "kernels": convmae_kernels.info()["cpu"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def cpu_name() -> str:
    """The processor's model name, as the operating system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
