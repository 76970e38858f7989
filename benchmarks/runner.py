"""Measures the contenders of a comparison in turn, and makes rows of figures of their times."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from benchmarks.limits import Clock, Rates
    from benchmarks.work import Work

BASELINE = "dense"
MIN_ROUNDS = 3
# Largest relative error `|a - b| / |b|` between a contender's result and the baseline's.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


class CapturedGraph:
    """Runs a function as a CUDA graph, captured at the first call; its results are overwritten."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self._run = run
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> Any:
        if self._graph is None:
            self.capture()
        assert self._graph is not None
        self._graph.replay()
        return self._result

    def capture(self) -> None:
        """Runs the function three times, then captures it without running it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # what is compiled or tuned when first called
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._result = self._run()


class DisagreementError(RuntimeError):
    """Two contenders of a comparison computed different things."""


@dataclass(frozen=True)
class Contender:
    """One way of doing the work.

    Attributes:
        name: "dense" for the baseline.
        run: does the work once.
        result: what `run` returned, in a form in which all contenders can be compared.
        measured: the measure of the last run, where it took place in another process; None where
            the comparison's clock measures it.
    """

    name: str
    run: Callable[[], Any]
    result: Callable[[Any], Sequence[Tensor]]
    measured: Callable[[], float] | None = None

    def measure(self, clock: Clock) -> tuple[float, Any]:
        """Runs once: the measure, and what `run` returned."""
        if self.measured is None:
            return clock(self.run)
        output = self.run()
        return self.measured(), output


@dataclass(frozen=True)
class Comparison:
    """Several ways of doing the same work, one of them the baseline.

    Attributes:
        contenders: in the order in which they are measured and printed.
        work: what must be moved and computed, whoever does it.
        clock: runs a function and gives its measure, in `unit`, and its result.
        unit: "ms", "MiB", or that of something counted.
        max_rounds: more rounds than this would say nothing new; None if they would.
        warm_up: the first round is thrown away.
        notes: what was left out, and why.
        failures: contenders that failed or disagreed, and how; `measure` leaves them out.
        baseline: the contender that the others are compared with.
    """

    contenders: list[Contender]
    work: Work
    clock: Clock
    unit: str = "ms"
    max_rounds: int | None = None
    warm_up: bool = True
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    baseline: str = BASELINE

    def limit(self, rates: Rates, dtype: torch.dtype) -> float:
        """The least possible measure, in `unit`; 0 where none is known."""
        if self.unit == "MiB":
            return self.work.bytes / 2**20
        return 1e3 * self.work.limit_seconds(rates, dtype) if self.unit == "ms" else 0.0


@dataclass(frozen=True)
class Row:
    """The figures of one contender.

    Attributes:
        case, dtype, contender, unit: what was measured, and in what.
        median: of all rounds.
        spread: interquartile range / median.
        ratio: the baseline's median / this median; above 1 is better than the baseline.
        round_ratio: the median over rounds of the baseline's measure / this one's in that round.
        rounds: how often it was measured.
        bytes, flops: what must be moved and computed; see `Work`.
        limit: the least possible measure, from `bytes`, `flops` and the machine's measured rates.
        fraction: limit / median.
        at: of a point of a sweep its `op`, its `axis` and the sizes it was measured at, by name;
            empty for the cases that are measured at the setting.
    """

    case: str
    dtype: str
    contender: str
    unit: str
    median: float
    spread: float
    ratio: float
    round_ratio: float
    rounds: int
    bytes: int
    flops: int
    limit: float
    fraction: float
    at: dict[str, Any] = field(default_factory=dict)


def measure(
    comparison: Comparison, dtype: torch.dtype, *, repeats: int, budget: float
) -> dict[str, list[float]]:
    """Measures the contenders in turn: A B C, A B C, ...

    The results of the first round, which is not counted, must agree. A contender that fails, or
    whose result differs from the baseline's, is noted in `comparison.failures` and left out.

    Args:
        comparison: what to measure.
        dtype: sets the tolerance of the agreement.
        repeats: rounds at most.
        budget: seconds after which no further round is begun, once there are three.

    Returns:
        The measures of each contender, one for each round.

    Raises:
        DisagreementError: nothing is left to compare.
    """
    first = _first_round(comparison, TOLERANCE[dtype])
    contenders = [c for c in comparison.contenders if c.name in first]
    times = {name: [] if comparison.warm_up else [value] for name, value in first.items()}
    repeats = min(repeats, comparison.max_rounds or repeats)
    rounds = len(times[comparison.baseline])
    start = time.perf_counter()
    while rounds < repeats and (rounds < MIN_ROUNDS or time.perf_counter() - start < budget):
        for contender in contenders:
            times[contender.name].append(contender.measure(comparison.clock)[0])
        rounds += 1
    return times


def _first_round(comparison: Comparison, tolerance: float) -> dict[str, float]:
    """The first measure of each contender that runs and agrees with the baseline.

    Raises:
        DisagreementError: the baseline fails, or no other is left.
    """
    first: dict[str, float] = {}
    results: dict[str, Sequence[Tensor]] = {}
    for contender in comparison.contenders:
        try:
            value, output = contender.measure(comparison.clock)
            results[contender.name] = contender.result(output)
            first[contender.name] = value
        except Exception as error:
            comparison.failures.append(f"{contender.name}: {one_line(error)}")
    if comparison.baseline not in first:
        raise DisagreementError("; ".join(comparison.failures))
    for name in [name for name in first if name != comparison.baseline]:
        both = {name: results[name], comparison.baseline: results[comparison.baseline]}
        try:
            check_agreement(both, tolerance, comparison.baseline)
        except DisagreementError as error:
            comparison.failures.append(f"{name}: {error}")
            del first[name]
    if comparison.failures and len(first) < 2:
        raise DisagreementError("; ".join(comparison.failures))
    return first


def one_line(error: Exception) -> str:
    """An error's type and the first line of its message."""
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def check_agreement(
    results: Mapping[str, Sequence[Tensor]], tolerance: float, baseline: str = BASELINE
) -> None:
    """Every contender's tensors are the baseline's, up to a relative error of `tolerance`.

    Raises:
        DisagreementError: they are not; the message names the contender and the error.
    """
    for name, tensors in results.items():
        expected = results[baseline]
        if len(tensors) != len(expected):
            raise DisagreementError(
                f"{name!r} gives {len(tensors)} tensors, {baseline!r} {len(expected)}"
            )
        for i, (a, b) in enumerate(zip(tensors, expected, strict=True)):
            if a.shape != b.shape:
                raise DisagreementError(
                    f"tensor {i} of {name!r} is {list(a.shape)}, of {baseline!r} {list(b.shape)}"
                )
            a, b = a.detach().double(), b.detach().double()
            error = float((a - b).norm() / b.norm().clamp_min(1e-30))
            if not error <= tolerance:
                raise DisagreementError(
                    f"tensor {i} of {name!r} has a relative error of {error:.2e} against "
                    f"{baseline!r}; at most {tolerance:.0e} was expected"
                )


def spread(values: Sequence[float]) -> float:
    """Interquartile range / median; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle


def make_rows(
    case: str,
    comparison: Comparison,
    times: Mapping[str, Sequence[float]],
    rates: Rates,
    dtype: torch.dtype,
    at: Mapping[str, Any] | None = None,
) -> list[Row]:
    """The figures of every contender of a comparison."""
    limit = comparison.limit(rates, dtype)
    baseline = times[comparison.baseline]
    rows = []
    for name, values in times.items():
        median = statistics.median(values)
        rows.append(
            Row(
                case=case,
                dtype=str(dtype).removeprefix("torch."),
                contender=name,
                unit=comparison.unit,
                median=median,
                spread=spread(values),
                ratio=statistics.median(baseline) / median,
                round_ratio=statistics.median(b / v for b, v in zip(baseline, values, strict=True)),
                rounds=len(values),
                bytes=comparison.work.bytes,
                flops=comparison.work.flops,
                limit=limit,
                fraction=limit / median,
                at=dict(at or {}),
            )
        )
    return rows
