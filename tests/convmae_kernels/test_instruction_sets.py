"""The CPU kernels exist for several instruction sets: those that are not chosen are right too."""

import os
import subprocess
import sys

import pytest
import torch

from convmae_kernels.ops.support.dispatch import why_not
from tests.support.paths import ROOT

TESTS = "test_every_vector_width_and_its_remainder"


def widest():
    return torch.ops.convmae.cpu_capability()


@pytest.mark.skipif(
    why_not("cpu", torch.zeros(0)) is not None, reason="there are no compiled kernels"
)
@pytest.mark.parametrize(("capability", "expected"), [("default", "baseline"), ("avx2", "AVX2")])
@pytest.mark.thorough
def test_a_narrower_instruction_set(capability, expected):
    """`ATEN_CPU_CAPABILITY`, which torch obeys too, asks for less than the machine has."""
    env = os.environ | {"ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": str(ROOT)}
    find = "import torch, convmae_kernels; print(torch.ops.convmae.cpu_capability())"
    found = subprocess.run(
        [sys.executable, "-c", find], env=env, capture_output=True, text=True, check=True
    ).stdout.strip()
    if capability != "default" and (found != expected or found == widest()):
        pytest.skip(f"this machine has {widest()}: nothing to narrow")
    assert found == expected
    tests = [
        str(ROOT / "tests" / "convmae_kernels" / "ops" / "test_masked_conv2d.py"),
        "-q",
        "-x",
        "-p",
        "no:xdist",
        "-k",
        TESTS,
    ]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *tests], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout
