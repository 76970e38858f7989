"""Tests of a file once more, with the kernels of a lower instruction set."""

import os
import subprocess
import sys

import pytest
import torch

from tests.support.paths import ROOT

LOWER = [("default", "baseline"), ("avx2", "AVX2")]  # of PyTorch, and its name here


def run_tests(file, chosen, level, name):
    """Runs the tests of `file` that `-k chosen` matches in a process with kernels of `level`."""
    code = (
        "import sys, pytest, torch, convmae_kernels\n"
        "print(torch.ops.convmae.cpu_capability())\n"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-k', *sys.argv[1:]]))"
    )
    if torch.ops.convmae.cpu_capability() in (name, "baseline"):
        pytest.skip("the other tests run these kernels on this machine")
    done = subprocess.run(
        [sys.executable, "-c", code, chosen, file],
        capture_output=True,
        text=True,
        env={**os.environ, "ATEN_CPU_CAPABILITY": level},
        cwd=ROOT,
        check=False,
    )
    assert name in done.stdout.splitlines()[0]
    assert done.returncode == 0, done.stdout
