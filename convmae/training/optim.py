"""The official recipe's optimiser groups and learning-rate schedule."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn

BETAS = (0.9, 0.95)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decays matrices and kernels, not vectors and biases; leaves frozen parameters out.

    The rule of the official code: no decay for parameters of one dimension and for `*.bias`. The
    mask token (three dimensions) is decayed; the position embeddings are frozen, so absent.

    Returns:
        Two groups for `torch.optim.AdamW`: without decay, with `weight_decay`.
    """
    plain: list[torch.Tensor] = []
    decayed: list[torch.Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            undecayed = parameter.ndim <= 1 or name.endswith(".bias")
            (plain if undecayed else decayed).append(parameter)
    return [
        {"params": plain, "weight_decay": 0.0},
        {"params": decayed, "weight_decay": weight_decay},
    ]


def make_optimiser(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW, betas (0.9, 0.95), over `parameter_groups`; its learning rate is set every step."""
    groups = parameter_groups(model, weight_decay)
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, fused=fused)


def lr_at(epoch: float, peak: float, floor: float, warmup_epochs: float, epochs: int) -> float:
    """`peak * epoch / warmup`, then `floor + (peak - floor) * (1 + cos(pi * t)) / 2`.

    Args:
        epoch: how far the run is, in epochs, fractions included: it changes every step.
        peak, floor: learning rates after the warm-up and at the end.
        warmup_epochs: length of the linear rise from 0.
        epochs: length of the run; `t` goes from 0 after the warm-up to 1 there.
    """
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    t = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-12)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * min(t, 1.0)))


def set_lr(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Gives every group the learning rate `lr`."""
    for group in optimiser.param_groups:
        group["lr"] = lr
