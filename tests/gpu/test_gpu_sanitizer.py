"""The compiled CUDA kernels under compute-sanitizer; `make gpu STAGES=test` runs these."""

import shutil
import subprocess
import sys

import pytest
import torch

from tests.support.paths import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU"),
]
PROGRAM = """
import torch, convmae_kernels as ck
mask = ck.BlockMask.random(2, (4, 4), 0.5, device="cuda")
for side, dtype in ((4, torch.bfloat16), (2, torch.float32), (1, torch.float64)):
    images = torch.randn(2, 72, 4 * side, 4 * side, device="cuda", dtype=dtype)
    weight = torch.randn(72, 1, 5, 5, device="cuda", dtype=dtype, requires_grad=True)
    x = ck.gather_visible(images.requires_grad_(), mask, impl="cuda")
    y = ck.masked_conv2d(x, weight, None, mask, groups=72, impl="cuda")
    windows = ck.gather_windows(y, mask, (1, 1, 1, 1), impl="cuda")
    (ck.scatter_visible(y, mask, impl="cuda").sum() + windows.sum()).backward()
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer(tool):
    """Of our kernels alone, by their namespace: PyTorch probes the driver with calls that fail."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [program, "--tool", tool, "--error-exitcode", "9", "--kernel-regex", "kns=convmae"]
    if tool == "memcheck":
        command += ["--report-api-errors", "no"]
    done = subprocess.run(
        [*command, sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
