"""How long each part of a training step takes, forward and backward: packed and dense.

Hooks on the modules say where the step is; what is between two of them belongs to the first. The
parts are those of `benchmarks.budget`, which counts what they ask of a GPU.
"""

from __future__ import annotations

import time
from collections import defaultdict
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import models
from benchmarks.budget import follow
from benchmarks.registry import Case
from benchmarks.runner import Comparison, Contender
from benchmarks.work import Work

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.setting import Setting

KINDS = ("packed", "dense")
ROUNDS = 4  # the first is not counted
LOSS = "mask and loss"  # the loss's own gradient is in it
PARTS = [
    *((LOSS, "forward"), ("stage 1", "forward"), ("stage 2", "forward"), ("stage 3", "forward")),
    *(("decoder", "forward"), ("decoder", "backward"), ("stage 3", "backward")),
    *(("stage 2", "backward"), ("stage 1", "backward"), ("optimizer", "step")),
]


class Stopwatch:
    """Milliseconds between the entries into parts, summed by part and phase."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[tuple[str, str], Any]] = []

    def enter(self, part: str, phase: str) -> None:
        """What comes now belongs to this part."""
        self._marks.append(((part, phase), self._now()))

    def read(self) -> dict[tuple[str, str], float]:
        """Ends the last part; the sums since the last reading."""
        self.enter("", "")
        if self._on_gpu:
            torch.cuda.synchronize()
        sums: dict[tuple[str, str], float] = defaultdict(float)
        for (part, begin), (_, end) in zip(self._marks[:-1], self._marks[1:]):
            sums[part] += begin.elapsed_time(end) if self._on_gpu else 1e3 * (end - begin)
        self._marks = []
        return dict(sums)

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class _Measured:
    """The parts' times of every contender, measured in turn when they are first asked for."""

    def __init__(self, setting: Setting, dtype: torch.dtype) -> None:
        self._setting, self._dtype = setting, dtype

    @cached_property
    def rounds(self) -> dict[str, list[dict[tuple[str, str], float]]]:
        """Of each contender the sums of each round."""
        runs = {kind: self._build(kind) for kind in KINDS}
        found: dict[str, list[dict[tuple[str, str], float]]] = {kind: [] for kind in KINDS}
        for _ in range(ROUNDS):
            for kind, run in runs.items():
                found[kind].append(run())
        return found

    def _build(self, kind: str) -> Callable[[], dict[tuple[str, str], float]]:
        setting = self._setting
        model, watch = models.build(setting, kind), Stopwatch(setting.device)
        follow(model, watch.enter)
        model.decoder_pred.register_forward_hook(lambda *_: watch.enter(LOSS, "forward"))
        optimizer = models.new_optimizer(model)
        optimizer.register_step_pre_hook(lambda *_: watch.enter("optimizer", "step"))
        step = models.training_step(model, setting, self._dtype, optimizer=optimizer)
        pixels, noise = models.images(setting), setting.noise()

        def run() -> dict[tuple[str, str], float]:
            watch.enter(LOSS, "forward")
            step(pixels, noise)
            return watch.read()

        return run


def cases(setting: Setting, dtype: torch.dtype) -> list[Case]:
    """A case for each part of a step in one dtype; all are of the same few steps."""
    measured = _Measured(setting, dtype)
    return [_case(setting, dtype, measured, *part) for part in PARTS]


def _case(setting: Setting, dtype: torch.dtype, measured: _Measured, part: str, phase: str) -> Case:
    def rounds(kind: str) -> Iterator[float]:
        for sums in measured.rounds[kind]:
            yield sums[part, phase]

    def read(run: Callable[[], Any]) -> tuple[float, None]:
        return run(), None

    def build(_: Setting, dtype: torch.dtype) -> Comparison:
        contenders = [Contender(kind, partial(next, rounds(kind)), lambda _: []) for kind in KINDS]
        return Comparison(contenders, Work(0), read, max_rounds=ROUNDS - 1)

    at: dict[str, Any] = {"op": "step/parts", "axis": "part", "part": part, "phase": phase}
    at |= {"batch": setting.batch_size, "threads": torch.get_num_threads()}
    name = f"sweep/step/parts/{part}, {phase}".replace(" ", "_").replace(",", "")
    about = "A part of the training step, of the packed and of the dense model."
    return Case(name, about, build, dtypes=(dtype,), at=at)
