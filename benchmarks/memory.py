"""Peak memory of training steps, each in a fresh process: `benchmarks.memory_process`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from benchmarks.setting import Setting

# A small process that starts the measured one and prints its peak memory. It stands in between
# because after `exec` Linux keeps the peak of the parent, and this process may be large.
WATCH = """
import json, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, text=True)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps([done.returncode, peak * (1 if sys.platform == "darwin" else 1024), done.stdout]))
"""


@dataclass(frozen=True)
class Peak:
    """Peak bytes of a process that took a training step, and the step's loss."""

    bytes: int
    loss: float


def measure_peak(
    setting: Setting,
    dtype: torch.dtype,
    contender: str,
    steps: bool = True,
    network: str | None = None,
) -> Peak:
    """Peak memory of a fresh process that takes a step of one image and one of the whole batch.

    Without `steps` it only builds the model. With a `network` of timm it runs that instead, forward
    and backward.

    On a CPU that is the resident memory by `getrusage`, Python and PyTorch included; on a GPU
    what PyTorch's allocator has handed out.

    Raises:
        RuntimeError: the process failed.
    """
    facts = json.dumps(asdict(setting) | {"device": str(setting.device)})
    command = [sys.executable, "-m", "benchmarks.memory_process", contender, str(dtype)[6:]]
    command += [str(torch.get_num_threads()), str(int(steps)), network or "", facts]
    root = str(Path(__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    watch = subprocess.run(
        [sys.executable, "-c", WATCH, *command],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    code, peak, output = json.loads(watch.stdout)
    if code != 0:
        raise RuntimeError(f"the process measuring {contender!r} ended with exit code {code}")
    said = json.loads(output)
    return Peak(said["cuda_bytes"] or peak, said["loss"])
