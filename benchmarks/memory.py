"""Peak memory of training steps, each in a fresh process.

`python -m benchmarks.memory CONTENDER DTYPE THREADS STEPS NETWORK SETTING_JSON` is that process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import models
from benchmarks.setting import Setting

# A process that starts another and says how much memory that took at most. It stands between this
# process and the measured one, since Linux counts what a process was before it became another
# program: the measured one would be said to have taken what this one has taken.
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
    command = [sys.executable, "-m", "benchmarks.memory", contender, str(dtype)[6:]]
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


def take_steps(
    setting: Setting, dtype: torch.dtype, contender: str, steps: bool
) -> dict[str, float]:
    """The step of one image makes the optimizer allocate its state; the second is a usual one."""
    step = models.training_step(models.build(setting, contender), setting, dtype)
    loss = 0.0
    if steps:
        pixels, noise = models.images(setting), setting.noise()
        step(pixels[:1], noise[:1])
        loss = float(step(pixels, noise))
    return _found(setting, loss)


def run_network(
    setting: Setting, dtype: torch.dtype, contender: str, steps: bool, name: str
) -> dict[str, float]:
    """Forward and backward of a network of timm, twice: gradients are there in the second."""
    from benchmarks import networks

    model, mask = networks.build(name, setting), networks.network_mask(setting)
    loss = 0.0
    for _ in range(2 if steps else 0):
        (features,) = networks.forward_backward(model, setting, dtype, contender, mask)
        loss = float(features.float().square().mean())
    return _found(setting, loss)


def _found(setting: Setting, loss: float) -> dict[str, float]:
    on_gpu = setting.device.type == "cuda"
    return {
        "loss": loss,
        "cuda_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
    }


if __name__ == "__main__":
    contender, dtype, threads, steps, network, facts = sys.argv[1:]
    torch.set_num_threads(int(threads))
    values = json.loads(facts)
    chosen = Setting(**values | {"device": torch.device(values["device"])})
    arguments = (chosen, getattr(torch, dtype), contender, steps == "1")
    print(json.dumps(run_network(*arguments, network) if network else take_steps(*arguments)))
