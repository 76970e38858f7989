"""The device of the GPU stages: a GPU, or a stand-in for one on any machine.

Everything that a stage needs of a GPU is here: tensors' place, clock, graphs, profiler, sizes. The
stand-in does all of it on the CPU, at tiny sizes: it shows that the stages run and report, and its
times mean nothing. Whatever it leaves is named "stand-in" and says `"stand_in": true`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.limits import copy_bandwidth, environment
from benchmarks.setting import Setting
from convmae_kernels.ops.support.dispatch import why_not

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FAULTS = "CONVMAE_REHEARSAL_FAULTS"  # what goes wrong in a rehearsal: "stage/item=kind ..."
STAND_IN = "stand-in"


@dataclass(frozen=True)
class Launch:
    """The launches of a kernel in a profile: its name, how many, and their microseconds in all."""

    name: str
    count: int
    us: float


class Device:
    """A GPU.

    Attributes:
        stand_in: whether it is none.
        name: "NVIDIA H200"; slug: "h200", for names of files.
        where: of tensors.
        l2_bytes: of the cache that timings must not be answered by.
        batches: sizes of batch at which kernels are measured.
        check_batch: images in a check.
        setting: of the training steps.
        fill_ms: how long a replay of a graph of launches should take at least.
        seconds: for the rounds of one timing.
        item_seconds: after which an item of a stage hangs.
    """

    stand_in = False
    batches: tuple[int, ...] = (128, 256)
    check_batch = 8
    fill_ms, seconds, item_seconds = 4.0, 0.25, 30.0
    # What a profiler writes down, and which of it is a launch.
    activity = torch.profiler.ProfilerActivity.CUDA
    categories: tuple[str, ...] = ("kernel", "gpu_memcpy", "gpu_memset")

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(0)
        self.name = properties.name
        self.slug = slug(self.name)
        self.where = torch.device("cuda")
        self.l2_bytes = getattr(properties, "L2_cache_size", 0) or 64 * 2**20
        self.setting = Setting(batch_size=128, device=self.where, compile=False)

    def grid(self, side: int) -> int:
        """Blocks in a row of an image in which blocks have this side in the first stage."""
        return 7 if side > 4 else 14

    def implementations(self) -> dict[str, str | None]:
        """Whose kernels are measured, and why they cannot be; None: they can."""
        probe = torch.zeros(0, device=self.where)
        return {name: why_not(name, probe) for name in ("cuda", "triton")}  # type: ignore[arg-type]

    def facts(self) -> dict[str, Any]:
        """What the figures were measured on."""
        return environment(self.where) | {"device": self.name, "stand_in": self.stand_in}

    def copy_rate(self) -> float:
        """Bytes read and written in a second by a large copy."""
        return copy_bandwidth(self.where)

    def synchronize(self) -> None:
        """Waits for the device, and raises what went wrong there."""
        torch.cuda.synchronize()

    def free(self) -> None:
        """Gives unused memory back."""
        torch.cuda.empty_cache()

    def milliseconds(self, run: Callable[[], object]) -> float:
        """The time of a call on the device."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def capture(self, run: Callable[[], object]) -> Callable[[], object]:
        """A function that does on the device what `run` does there."""
        stream = torch.cuda.Stream()  # libraries prepare for a stream at their first call there
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def launches(self, run: Callable[[], object]) -> list[Launch]:
        """What a profiler sees `run` launch, by kernel; the most expensive first."""
        with torch.profiler.profile(activities=[self.activity]) as profiler:
            run()
            self.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(trace))
            events = json.loads(trace.read_text())["traceEvents"]
        found: dict[str, list[float]] = {}
        for event in events:
            if event.get("ph") == "X" and event.get("cat") in self.categories:
                found.setdefault(event["name"], []).append(float(event["dur"]))
        launches = [Launch(name, len(times), sum(times)) for name, times in found.items()]
        return sorted(launches, key=lambda launch: -launch.us)

    def profiler_start(self) -> None:
        """From here on a profiler that waited looks at what is launched."""
        torch.cuda.profiler.start()

    def profiler_stop(self) -> None:
        """Until here."""
        torch.cuda.profiler.stop()

    def enter(self, item: str) -> None:
        """Told which item of a stage begins."""

    def outputs(self, item: str, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """What the kernels of an item gave."""
        return tensors

    def measure(self, call: Callable[[int], object], sets: int) -> dict[str, float]:
        """The time of a call, over many in a row, each on the next of `sets` sets of tensors.

        Args:
            call: works on the set of a number and returns what it allocated, which is kept until
                the set's next turn: so inputs and outputs leave the cache before they come again.
            sets: how many there are.

        Returns:
            Median microseconds of a call, their spread (interquartile range / median), and
            how many calls a replay of the graph makes.
        """
        kept: list[object] = [None] * sets

        def turn() -> None:
            for i in range(sets):
                kept[i] = call(i)

        turn()  # what is compiled, chosen or loaded at the first call
        self.synchronize()
        turns = max(1, min(64, round(self.fill_ms / max(self.milliseconds(turn), 1e-3))))

        def run() -> None:
            for _ in range(turns):
                turn()

        replay = self.capture(run)
        replay()
        times: list[float] = []
        begin = time.monotonic()
        while len(times) < 3 or (len(times) < 20 and time.monotonic() - begin < self.seconds):
            times.append(1e3 * self.milliseconds(replay) / (turns * sets))
        low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
        return {"us": middle, "spread": (high - low) / middle, "launches": turns * sets}


class StandIn(Device):
    """A CPU in place of a GPU, for rehearsals, in which things go wrong as `FAULTS` says.

    A fault is `stage/item=kind`: "raise", "crash", "hang" or "disagree". (What goes wrong with a
    whole stage, gpu.sh does.)
    """

    stand_in = True
    batches = (1, 2)
    check_batch = 2
    fill_ms, seconds, item_seconds = 0.0, 0.0, 20.0
    activity = torch.profiler.ProfilerActivity.CPU
    categories = ("cpu_op",)

    def __init__(self) -> None:
        self.name = self.slug = STAND_IN
        self.where = torch.device("cpu")
        self.l2_bytes = 1
        self.setting = Setting("convmae_tiny", 2, 64, device=self.where, compile=False)
        faults = (fault.rpartition("=") for fault in os.environ.get(FAULTS, "").split())
        self.faults = {item: kind for item, _, kind in faults}

    def grid(self, side: int) -> int:
        return 4

    def implementations(self) -> dict[str, str | None]:
        return {"cpu": why_not("cpu", torch.zeros(0))}

    def copy_rate(self) -> float:
        return copy_bandwidth(self.where, 2**20)

    def synchronize(self) -> None:
        pass

    def free(self) -> None:
        pass

    def milliseconds(self, run: Callable[[], object]) -> float:
        begin = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - begin) + 1e-6

    def capture(self, run: Callable[[], object]) -> Callable[[], object]:
        return run

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    def enter(self, item: str) -> None:
        kind = self.faults.get(item)
        if kind == "raise":
            raise RuntimeError("raised on purpose")
        if kind == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "hang":
            time.sleep(3600)

    def outputs(self, item: str, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        if self.faults.get(item) == "disagree":
            return [t + 1 for t in tensors]
        return tensors


def slug(name: str) -> str:
    """The name of a GPU in names of files: "NVIDIA H200" is "h200"."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"^nvidia ", "", name.lower())).strip("-")


def find(stand_in: bool) -> Device:
    """The device of a stage.

    Raises:
        RuntimeError: there is no GPU, and a stand-in was not asked for.
    """
    if stand_in:
        return StandIn()
    if not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} sees no CUDA GPU")
    return Device()
