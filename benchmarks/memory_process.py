"""The process whose peak memory `benchmarks.memory` measures: training steps, or a network's.

python -m benchmarks.memory_process CONTENDER DTYPE THREADS STEPS NETWORK SETTING_JSON
"""

from __future__ import annotations

import json
import sys

import torch

from benchmarks import models, networks, pretraining
from benchmarks.setting import Setting


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
    model, mask = networks.build(name, setting), networks.network_mask(setting)
    run, loss = networks.ForwardBackward(model, setting, dtype, contender, mask), 0.0
    for _ in range(2 if steps else 0):
        (features,) = run()
        loss = float(features.float().square().mean())
    return _found(setting, loss)


def run_step(
    setting: Setting, dtype: torch.dtype, contender: str, steps: bool, name: str
) -> dict[str, float]:
    """Steps of SparK or FCMAE; that of a part of the batch allocates the optimizer's state."""
    if not steps:
        pretraining.build(name, setting, contender)
        return _found(setting, 0.0)
    step = pretraining.Step(name, setting, dtype, contender)
    step(2)
    return _found(setting, float(step()))


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
    if network in pretraining.STEPS:
        found = run_step(*arguments, network)
    else:
        found = run_network(*arguments, network) if network else take_steps(*arguments)
    print(json.dumps(found))
