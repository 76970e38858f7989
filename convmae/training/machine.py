"""Which device and which arithmetic a run uses, and what this machine has to offer."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from convmae.config import OptionError

CPU_BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")  # Intel, AMD; the last one is Arm's


def pick_device(name: str) -> torch.device:
    """The device called `name`; `auto` is CUDA where there is one, else the CPU.

    Raises:
        OptionError: no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise OptionError(f"--device {name!r}: this machine has {count} CUDA devices")
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise OptionError("--device 'mps': this machine has no MPS device")
    elif device.type != "cpu":
        raise OptionError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    return device


def native_bfloat16(device: torch.device) -> tuple[bool, str]:
    """Whether `device` multiplies bfloat16 in hardware, and how one knows."""
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0) or bool(torch.version.hip)
        return native, torch.cuda.get_device_name(device)
    if device.type == "cpu":
        flags = _cpu_flags()
        found = [flag for flag in CPU_BFLOAT16_FLAGS if flag in flags]
        if found:
            return True, f"the CPU has {found[0]}"
        return False, "the CPU has none of " + ", ".join(CPU_BFLOAT16_FLAGS)
    return False, f"not known of {device.type}"


def _cpu_flags() -> set[str]:
    """The processor's feature flags, from Linux's /proc/cpuinfo; nothing elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return set()
    for line in cpuinfo.read_text(errors="replace").splitlines():
        name, _, values = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(values.split())
    return set()


def pick_dtype(amp: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The arithmetic of a run, and the reason in words.

    `auto` is bfloat16 where the device multiplies it natively, float16 on other CUDA devices, else
    float32.
    """
    if amp != "auto":
        return getattr(torch, amp), "as asked"
    native, why = native_bfloat16(device)
    if native:
        return torch.bfloat16, f"auto: {why}"
    if device.type == "cuda":
        return torch.float16, f"auto: {why} has no bfloat16"
    return torch.float32, f"auto: {why}"


def machine_info() -> dict[str, str]:
    """Versions, devices, threads and what runs the ops, as `convmae info` prints them."""
    import convmae_kernels

    device = pick_device("auto")
    native, why = native_bfloat16(device)
    entries = {
        "convmae": convmae_kernels.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "device": str(device),
        "bfloat16": f"{'native' if native else 'not native'}: {why}",
    }
    return entries | convmae_kernels.info()
