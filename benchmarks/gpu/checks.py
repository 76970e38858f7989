"""Stage `checks`: every kernel against float64, its outputs poisoned before it runs."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.gpu import device as devices
from benchmarks.gpu import items, problems
from convmae_kernels.testing import assert_within_budget

if TYPE_CHECKING:
    from collections.abc import Sequence

EXACT = 1e-13  # in float64
MOVE_ONLY = ("gather", "scatter", "windows", "table")  # must be right to the bit


def names(device: devices.Device) -> list[str]:
    """`implementation:problem` of every check."""
    return [
        f"{implementation}:{problem.name}"
        for implementation in device.implementations()
        for problem in problems.checked(device)
        if not (implementation == "triton" and problem.kernel == "table")  # it has none
    ]


def check(device: devices.Device, item: str) -> items.Result:
    """Runs an implementation once on fresh random numbers.

    Raises:
        AssertionError: it errs more than `assert_within_budget` allows.
    """
    implementation, _, name = item.partition(":")
    reason = device.implementations()[implementation]
    if reason is not None:
        return {"skipped": reason}
    problem = next(p for p in problems.checked(device) if p.name == name)
    seed = torch.seed() % 2**31
    try:
        return _compare(device, item, problem, implementation, seed)
    except AssertionError as error:
        raise AssertionError(f"{error} (seed {seed})") from None


def _compare(device, item, problem, implementation, seed) -> items.Result:
    mask = problem.mask(device)
    given = problems.arguments(problem, device, mask, seed)
    if implementation == "triton" or problem.kernel in problems.PASSES:
        _no_tuning()
    _poison()
    found = device.outputs(f"checks/{item}", problems.call(problem, implementation, given))
    device.synchronize()
    plain = problems.call(problem, "reference", given)
    if problem.kernel in MOVE_ONLY:
        for a, b in zip(found, plain, strict=True):
            if a.dtype != b.dtype or not torch.equal(a, b):
                raise AssertionError("moves something else than the reference")
        return {"ok": True}
    if problem.dtype == "float64":  # the reference rounds as much
        error = items.largest_error(found, plain)
        if not error <= EXACT:
            raise AssertionError(f"a relative error of {error:.1e}, at most {EXACT:.0e} expected")
        return {"ok": True, "error": error}
    exact = problems.call(problem, "reference", _map(Tensor.double, given))
    terms = problems.call(problem, "reference", _map(lambda x: x.double().abs(), given))
    for values in zip(found, exact, plain, terms, strict=True):
        assert_within_budget(*values)
    return {"ok": True, "error": items.largest_error(found, exact)}


def _map(function: Any, given: Sequence[Any]) -> tuple[Any, ...]:
    """The floating tensors among some arguments changed."""
    return tuple(
        function(x) if isinstance(x, Tensor) and x.is_floating_point() else x for x in given
    )


def _poison() -> None:
    """From here on PyTorch fills what is allocated without values: NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def _no_tuning() -> None:
    """Triton runs its first configuration: the others take seconds to compile."""
    from convmae_kernels.triton import tuning

    tuning.MIN_ELEMENTS = sys.maxsize


def main(arguments: Sequence[str]) -> None:
    """The worker of the stage."""
    device = devices.find("--stand-in" in arguments)
    items.work(device, "checks", names(device), partial(check, device))


if __name__ == "__main__":
    main(sys.argv[1:])
