"""Optimizers and schedules of the official recipes, by timm and PyTorch."""

from __future__ import annotations

import logging
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from torch import nn

    from convmae.config import RunConfig

Groups = list[dict[str, Any]]


def decay_groups(model: nn.Module, weight_decay: float, undecayed: Collection[str] = ()) -> Groups:
    """Decays matrices and kernels, not vectors and biases; leaves frozen parameters out.

    ConvMAE's mask token (three dimensions) is decayed, as in the official code; the position
    embeddings are frozen there, so absent.

    Args:
        model: whose parameters.
        weight_decay: of those that are decayed.
        undecayed: names of others that are not.
    """
    from timm.optim import param_groups_weight_decay

    return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=undecayed)


def layer_decay_groups(model: Any, weight_decay: float, layer_decay: float) -> Groups:
    """`decay_groups` by layers, each with the share of the learning rate it gets (`lr_scale`).

    The head learns at the full rate, the last block at `layer_decay` of it, and so on down. The
    convolution stages of a ConvViT, with patch and position embeddings, are one layer; networks of
    timm have the layers of timm's `group_matcher`, mostly one for each block.
    """
    from timm.optim import param_groups_layer_decay

    return param_groups_layer_decay(
        model,
        weight_decay=weight_decay,
        no_weight_decay_list=model.no_weight_decay(),
        layer_decay=layer_decay,
    )


def layered_groups(
    model: Any, weight_decay: float, layer_decay: float, decay_all: bool = False
) -> Groups:
    """Parameters of a model for dense tasks by decay and by layer, with `lr_scale` of each.

    A parameter of layer `i` of `model.layer_ids()` learns at
    `layer_decay ** (model.num_layers - 1 - i)` of the rate. Vectors, biases and what
    `model.no_weight_decay()` names have no decay; frozen parameters are left out.

    Args:
        model: a segmenter, or another model with these three.
        weight_decay: of those that are decayed.
        layer_decay: in `(0, 1]`.
        decay_all: only what `model.no_weight_decay()` names has no decay; vectors and biases have.
    """
    layers, undecayed = model.layer_ids(), model.no_weight_decay()
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        matrix = parameter.ndim > 1 and not name.endswith(".bias")
        decayed = (decay_all or matrix) and name not in undecayed
        scale = layer_decay ** (model.num_layers - 1 - layers[name])
        settings = {"weight_decay": weight_decay if decayed else 0.0, "lr_scale": scale}
        group = groups.setdefault((layers[name], decayed), settings | {"params": []})
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def adamw(groups: Groups, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW over the groups, fused where their device has that; a scheduler sets the rates."""
    parameters = [p for group in groups for p in group["params"]]
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=fused)


def lamb(
    groups: Groups, betas: tuple[float, float], clip_grad: float | None, finetuning: bool = False
) -> torch.optim.Optimizer:
    """timm's LAMB, which limits the norm of the gradient itself (`clips_by_itself`).

    Args:
        groups: of parameters.
        betas: decays of the running means.
        clip_grad: the largest norm.
        finetuning: as SparK finetunes ResNets: all layers are adapted, those without a weight decay
            too, and the running means are not corrected in the first steps.
    """
    from timm.optim import Lamb

    kind: Any = {"always_adapt": True, "bias_correction": False} if finetuning else {}
    return Lamb(groups, lr=0.0, betas=betas, max_grad_norm=clip_grad, **kind)


def sgd(groups: Groups) -> torch.optim.SGD:
    """SGD with Nesterov's momentum of 0.9."""
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True)


def clips_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer limits the norm of the gradient in its own step."""
    return optimizer.defaults.get("max_grad_norm") is not None


def lars(groups: Groups) -> torch.optim.Optimizer:
    """LARS, momentum 0.9 and trust coefficient 0.001; vectors are not adapted, as officially."""
    from timm.optim import Lars

    adapted = [
        group | {"params": [p for p in group["params"] if (p.ndim > 1) == matrices]}
        for group in groups
        for matrices in (False, True)
    ]
    kept = [group for group in adapted if group["params"]]
    for group in kept:
        group["always_adapt"] = group["params"][0].ndim > 1  # even without a weight decay
    return Lars(kept, lr=0.0, momentum=0.9, trust_coeff=0.001)


class Schedule:
    """Sets learning rates, and decays where they change, before every optimizer step.

    Args:
        rates: a scheduler of timm.
        optimizer: whose groups it sets.
        decay_end: the weight decay of the last step; None where it stays.
        steps: of the whole run.
    """

    def __init__(
        self, rates: Any, optimizer: torch.optim.Optimizer, decay_end: float | None, steps: int
    ) -> None:
        self._rates, self._optimizer = rates, optimizer
        self._end, self._last = decay_end, max(steps - 1, 1)
        self._begins = [group["weight_decay"] for group in optimizer.param_groups]

    def step_update(self, step: int) -> None:
        """Sets those of optimizer step `step`, counted from 0."""
        self._rates.step_update(step)
        if self._end is None:
            return
        begun = 0.5 + 0.5 * math.cos(math.pi * step / self._last)  # 1 at the first, 0 at the last
        for group, begin in zip(self._optimizer.param_groups, self._begins, strict=True):
            if begin:  # vectors have no decay
                group["weight_decay"] = self._end + (begin - self._end) * begun


def make_scheduler(
    optimizer: torch.optim.Optimizer, config: RunConfig, peak: float, steps_per_epoch: int
) -> Schedule:
    """Linear warm-up from `warmup_lr` to `peak`, then a half-cosine (or line) down to `min_lr`.

    With `sched` multistep it is divided by 10 at each share of the run in `decay_at` instead.

    The optimizer's own learning rate must be `peak`. `scheduler.step_update(step)` sets the rates
    of optimizer step `step`, counted from 0.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = peak
    warmup = config.warmup_epochs * steps_per_epoch
    steps = config.total_steps(steps_per_epoch)
    length: Any = max(steps - warmup, 1)  # a fraction, where warmup is
    common: dict[str, Any] = {
        "warmup_t": warmup,
        "warmup_lr_init": config.warmup_lr,
        "warmup_prefix": True,
        "t_in_epochs": False,
    }
    with _without_remarks():
        rates = _scheduler(optimizer, config, length, common)
    return Schedule(rates, optimizer, config.weight_decay_end, steps)


def _scheduler(
    optimizer: torch.optim.Optimizer, config: RunConfig, length: Any, common: dict[str, Any]
) -> Any:
    from timm.scheduler import (
        CosineLRScheduler,
        MultiStepLRScheduler,
        PolyLRScheduler,
        StepLRScheduler,
    )

    if config.sched == "multistep":
        warmup = common["warmup_t"]
        shares: tuple[float, ...] = config.decay_at  # type: ignore[attr-defined]
        # timm divides one step before a milestone, and counts from the end of the warm-up
        milestones = [share * (warmup + length) - warmup + 1 for share in shares]
        return MultiStepLRScheduler(optimizer, milestones, decay_rate=0.1, **common)
    if config.sched == "constant":
        return StepLRScheduler(optimizer, decay_t=length, decay_rate=1.0, **common)
    if config.sched == "linear":
        return PolyLRScheduler(optimizer, length, power=1.0, lr_min=config.min_lr, **common)
    return CosineLRScheduler(optimizer, length, lr_min=config.min_lr, **common)


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Keeps timm's remark on a schedule of one step from the user: `setup` says what it means."""
    loggers = [logging.getLogger(f"timm.scheduler.{name}") for name in ("cosine_lr", "poly_lr")]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        for logger, disabled in zip(loggers, before):
            logger.disabled = disabled
