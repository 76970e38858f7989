"""Stage `env`: what there is to run on; the first to fail where there is no GPU.

`python -m benchmarks.gpu.environment FILE [--stand-in]` writes it into FILE as `"environment"`, and
prints lines for a shell: the device's name in names of files, and its compute capability.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import convmae_kernels
from benchmarks.gpu import device as devices
from benchmarks.gpu import store

if TYPE_CHECKING:
    from collections.abc import Sequence

PACKAGES = ("triton", "numpy", "pytest", "pytest-xdist", "pytest-timeout")
PROGRAMS = ("ncu", "compute-sanitizer", "ninja")


def facts(device: devices.Device) -> dict[str, Any]:
    """Versions, the card, and which programs there are."""
    found: dict[str, Any] = device.facts() | {"slug": device.slug}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "no"
    found |= {program: shutil.which(program) or "no" for program in PROGRAMS}
    found["nvcc"] = _last_line(["nvcc", "--version"], "release")
    found["driver"] = _last_line(
        ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
    )
    found["kernels"] = convmae_kernels.info()
    if not device.stand_in:
        properties = torch.cuda.get_device_properties(0)
        major, minor = torch.cuda.get_device_capability()
        found["compute_capability"] = f"{major}.{minor}"
        found["multiprocessors"] = properties.multi_processor_count
        found["memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["l2_mib"] = round(device.l2_bytes / 2**20)
    return found


def _last_line(command: Sequence[str], word: str = "") -> str:
    """The last line of a program's output that has a word; "no" if there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "no"
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip() and word in line]
    return lines[-1] if lines else "no"


def main(arguments: Sequence[str]) -> None:
    """Runs the stage."""
    try:
        device = devices.find("--stand-in" in arguments)
    except RuntimeError as error:
        sys.exit(f"there is no GPU to measure on: {error}")
    found = facts(device)
    store.update(Path(arguments[0]), environment=found)
    capability = found.get("compute_capability", "")
    print(f"device={device.slug}\ncapability={capability}\n{device.name}")


if __name__ == "__main__":
    main(sys.argv[1:])
