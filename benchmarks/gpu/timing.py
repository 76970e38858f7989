"""Stage `kernels`: every kernel apart, against PyTorch eager and the copy rate measured then."""

from __future__ import annotations

import sys
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu import device as devices
from benchmarks.gpu import items, problems
from benchmarks.runner import TOLERANCE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

EAGER = "pytorch"
OF_TWO = ("weight_gradient", "gelu_gradient", "norm_gradient")  # kernels


def names(device: devices.Device) -> list[str]:
    """`implementation:problem` of everything that is timed: Triton's last, at one size only.

    Its kernels are compiled and tuned when they first run, which takes seconds for each.
    """
    all_problems = problems.timed(device)
    first, *rest = device.implementations()
    found = [f"{first}:{problem.name}" for problem in all_problems]
    for implementation in rest:
        found += [
            f"{implementation}:{problem.name}"
            for problem in all_problems
            if (problem.batch, problem.dtype) == (device.batches[0], "bfloat16")
            and problem.kernel != "table"  # Triton has none
        ]
    return found


def measure(device: devices.Device, item: str) -> items.Result:
    """The rows of an item: the implementation's and, beside the first one's, PyTorch's.

    Times are of results that agree with the reference; a row without says why.
    """
    implementation, _, name = item.partition(":")
    problem = next(p for p in problems.timed(device) if p.name == name)
    mask = problem.mask(device)
    sets = problems.sets_of(problem, mask, device)
    given = [problems.arguments(problem, device, mask, seed) for seed in range(sets)]
    expected = problems.call(problem, "reference", given[0])
    rate, moved = _copy_rate(device), problems.bytes_moved(problem, mask)
    facts = {
        **{"kernel": problem.kernel, "shape": problem.shape, "batch": problem.batch},
        **{"dtype": problem.dtype, "hidden": problem.ratio, "bytes": moved},
        **{"sets": sets, "copy_rate": rate, "in_cache": sets * moved < 2 * device.l2_bytes},
    }

    def row(who: str, call: Callable[[int], object]) -> dict[str, Any]:
        times = device.measure(call, sets)
        speed = moved / (1e-6 * times["us"])
        return {**facts, "implementation": who, **times, "rate": speed, "of_copy": speed / rate}

    def ours(i: int) -> Sequence[torch.Tensor]:
        return problems.call(problem, implementation, given[i])

    rows: list[dict[str, Any]] = []
    reason = device.implementations()[implementation]
    if reason is None:
        found = device.outputs(f"kernels/{item}", ours(0))
        failed = _disagreement(problem, found, expected)
        if failed is None:
            rows.append(row(implementation, ours))
            if problem.kernel in (
                "weight_gradient",
                "gelu_gradient",
                "norm_gradient",
            ):  # shares, then their sum: each apart
                launches = device.launches(lambda: [ours(i) for i in range(sets)])
                rows[0]["parts"] = [[x.name, x.count / sets, x.us / sets] for x in launches[:6]]
        else:
            rows.append({**facts, "implementation": implementation, "failed": failed})
    else:
        rows.append({**facts, "implementation": implementation, "skipped": reason})
    if implementation == next(iter(device.implementations())):
        rows.append(_opponents_row(device, problem, mask, given, expected, row, facts))
    failed = next((r["failed"] for r in rows if "failed" in r), None)
    return {"rows": rows} if failed is None else {"rows": rows, "failed": failed}


def _opponents_row(device, problem, mask, given, expected, row, facts) -> dict[str, Any]:
    """PyTorch's row; whatever becomes of it, the kernel's own row stays."""
    try:
        opponent = problems.opponent(problem, mask)
        prepared = [opponent.prepare(arguments) for arguments in given]

        def run(i: int) -> object:
            return opponent.run(*prepared[i])

        failed = _disagreement(problem, opponent.result(run(0)), expected)
        if failed is None:
            return row(EAGER, run)
    except Exception as error:
        device.synchronize()  # raises if the GPU answers no more
        failed = f"{type(error).__name__}: {error}"[:300]
    return {**facts, "implementation": EAGER, "failed": failed}


def _disagreement(problem, found, expected) -> str | None:
    error, most = items.largest_error(found, expected), TOLERANCE[problems.DTYPES[problem.dtype]]
    if error <= most:
        return None
    return f"disagrees with the reference: a relative error of {error:.2e}, at most {most:.0e}"


@cache
def _copy_rate(device: devices.Device) -> float:
    return device.copy_rate()


def main(arguments: Sequence[str]) -> None:
    """The worker of the stage."""
    device = devices.find("--stand-in" in arguments)
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32
    items.work(device, "kernels", names(device), partial(measure, device))


if __name__ == "__main__":
    main(sys.argv[1:])
