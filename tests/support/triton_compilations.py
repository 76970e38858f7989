"""How many kernels Triton compiles in the GPU tests, counted without a GPU.

    python -m tests.support.triton_compilations [-v]        # -v: by test as well

Runs the Triton tests of tests/gpu/test_gpu.py on the CPU. Nothing is launched: each launch is
written down as Triton would specialise it (dtypes, pointers and integers that 16 divides, integers
that are 1, constants, warps), and the reference gives the results. What a GPU tunes is launched in
every configuration. Tests that need a GPU's streams or graphs fail here, after their launches.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # the ops of `convmae_triton` are registered for the CPU ...

import pytest
import torch

from convmae_kernels.ops import reference
from convmae_kernels.ops.support import dispatch

del os.environ["TRITON_INTERPRET"]  # ... and the kernels are those that a GPU compiles


IMPORT_KERNEL = dispatch._import_triton_kernel


class Launches:
    """A plugin of pytest that writes down what is launched, by test."""

    def __init__(self) -> None:
        self.seen: dict[tuple, str] = {}
        self.tuned: set[str] = set()
        self.test = ""

    def launch(self, kernel, *args, grid=None, warmup=None, **constants) -> None:
        """In place of `JITFunction.run`."""
        key: list[object] = [kernel.fn.__name__]
        given = list(args)
        for parameter in kernel.params:
            value = constants[parameter.name] if parameter.name in constants else given.pop(0)
            key.append(self.specialised(parameter, value))
        key += [constants.get("num_warps"), constants.get("num_stages")]
        self.seen.setdefault(tuple(key), self.test)

    @staticmethod
    def specialised(parameter, value) -> object:
        """What the compiled kernel depends on of an argument."""
        if parameter.is_constexpr:
            return str(value)
        if isinstance(value, torch.Tensor):
            return value.dtype, value.data_ptr() % 16 == 0
        if not isinstance(value, int):
            return type(value)
        if parameter.do_not_specialize:
            return abs(value) < 2**31
        return value == 1, value % 16 == 0, abs(value) < 2**31

    def run(self, op, problem, configurations, launch, arguments):
        """In place of `tuning.run`: what is tuned runs in all configurations, once."""
        if arguments[0].numel() >= 1 << 18 and (op, problem) not in self.tuned:
            self.tuned.add((op, problem))
            for configuration in configurations:
                launch(configuration, *arguments)
        launch(configurations[0], *arguments)
        return launch(configurations[0], *arguments)

    def kernel(self, name):
        """In place of `_import_triton_kernel`: launches, and returns what the reference gives."""
        original = IMPORT_KERNEL(name)
        meaning = getattr(reference, "window_conv2d" if name == "grouped_conv2d" else name)

        def run(*arguments):
            original(*arguments)
            return meaning(*arguments)

        return run

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item) -> None:
        self.test = item.originalname
        module = item.module
        module.DEVICE = "cpu"
        if hasattr(module, "oracle"):  # the oracles are not what is counted
            module.oracle = module.dense_masked_conv2d = self.cheap
            module.assert_accurate = lambda *values: None

    @staticmethod
    def cheap(x, weight, bias, *rest):
        """Any function that has the derivatives of a convolution."""
        return x * x * weight.pow(2).sum() + bias.pow(2).sum()


def main() -> None:
    """Counts and prints."""
    import triton
    from triton.runtime.jit import JITFunction

    from convmae_kernels.triton import tuning

    launches = Launches()
    with (
        mock.patch.object(JITFunction, "run", lambda *a, **k: launches.launch(*a, **k)),
        mock.patch.object(tuning, "run", launches.run),
        mock.patch.object(dispatch, "_import_triton_kernel", launches.kernel),
        mock.patch.object(torch.cuda, "is_available", lambda: True),
    ):
        options = ["-q", "-m", "gpu", "-k", "triton", "-p", "no:cacheprovider", "--tb=line"]
        pytest.main([*options, "-rN", "tests/gpu/test_gpu.py"], plugins=[launches])
    by_test = Counter(launches.seen.values())
    if "-v" in sys.argv:
        for test, count in by_test.most_common():
            print(f"{count:6d}  {test}")
    print(f"{len(launches.seen)} kernels for Triton {triton.__version__} to compile")


if __name__ == "__main__":
    main()
