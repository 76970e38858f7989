"""Autocast: where it is on, which dtype it asks for, how to leave it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

# Asked once: `torch.compile` of torch 2.11 cannot trace the question.
_DEVICES = frozenset(
    device
    for device in ("cpu", "cuda", "xpu", "mps", "mtia", "hpu", "ipu", "maia", "xla")
    + (torch._C._get_privateuse1_backend_name(),)
    if torch.amp.is_autocast_available(device)
)


def autocast_is_on(device_type: str) -> bool:
    """`torch.is_autocast_enabled`, and False for devices that have no autocast."""
    return device_type in _DEVICES and torch.is_autocast_enabled(device_type)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that an op on `x` works in: autocast's where that is on, but float64 stays."""
    if x.dtype == torch.float64 or not autocast_is_on(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Turns autocast off where the device of `x` has it."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if kind in _DEVICES else nullcontext()
