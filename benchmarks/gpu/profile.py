"""Stage `profile`: every kernel of a whole training step, with its launches and its time.

`python -m benchmarks.gpu.profile FILE [--stand-in]` writes them into FILE.
"""

from __future__ import annotations

import re
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks import models
from benchmarks.gpu import device as devices
from benchmarks.gpu import store

if TYPE_CHECKING:
    from collections.abc import Sequence

STEPS = 3
# What a kernel is for, by its name; the first that matches.
KINDS = {
    "ours": r"convmae|masked_conv2d|gather_visible|scatter_visible|gather_windows|neighbour_table",
    "attention": r"flash|fmha|attention|softmax",
    "GEMM": r"gemm|cutlass|nvjet|xmma|cublas|addmm|aten::mm|splitK",
    "optimizer": r"multi_tensor|adam",
    "norm": r"norm",
    "copy, cast": r"copy|memcpy|memset|_to_|cat|transpose",
    "sum": r"reduce|sum|add_parts",
}


def kind(name: str) -> str:
    """What a kernel is for; "elementwise" if nothing in its name says more."""
    for found, pattern in KINDS.items():
        if re.search(pattern, name, re.IGNORECASE):
            return found
    return "elementwise"


def main(arguments: Sequence[str]) -> None:
    """Runs the stage."""
    device = devices.find("--stand-in" in arguments)
    path, setting = Path(arguments[0]), device.setting
    model = models.build(setting, "packed")
    step = models.training_step(model, setting, torch.bfloat16)
    run = partial(step, models.images(setting), setting.noise())
    for _ in range(3):
        run()
    device.synchronize()
    milliseconds = statistics.median(device.milliseconds(run) for _ in range(7))
    launches = device.launches(lambda: [run() for _ in range(STEPS)])
    total = sum(launch.us for launch in launches)
    rows = [
        {
            "kernel": launch.name,
            "kind": kind(launch.name),
            "launches": launch.count / STEPS,
            "ms": 1e-3 * launch.us / STEPS,
            "share": launch.us / total,
        }
        for launch in launches
    ]
    store.update(
        path,
        environment=device.facts(),
        setting={**vars(setting), "device": str(setting.device), "dtype": "bfloat16"},
        step_ms=milliseconds,
        kernels_ms=1e-3 * total / STEPS,
        launches=sum(launch.count for launch in launches) / STEPS,
        kernels=rows,
    )
    print(f"a step: {milliseconds:.2f} ms, its kernels {1e-3 * total / STEPS:.2f} ms")


if __name__ == "__main__":
    main(sys.argv[1:])
