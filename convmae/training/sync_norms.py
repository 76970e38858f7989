"""BatchNorms whose mean and variance are those of the batches of all processes."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from convmae_kernels.nn import SyncBatchNorm, batch_norm_of_all, takes_part


class _WithActivation:
    """The dropout and activation of a `timm.layers.BatchNormAct2d` come behind."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Any) -> Any:
        """Like `input`, a `Packed` or a dense map."""
        return self.act(self.drop(super().forward(input)))  # type: ignore[misc]


class SyncBatchNormAct(_WithActivation, SyncBatchNorm):
    """A synchronised `timm.layers.BatchNormAct2d`."""


class HostBatchNorm(nn.BatchNorm2d):
    """`convmae_kernels.nn.SyncBatchNorm` for a CPU, where DDP takes no `torch.nn.SyncBatchNorm`."""

    def forward(self, input: Any) -> Any:
        """Like `input`, a `Packed` or a dense map."""
        return batch_norm_of_all(self, input) if takes_part(self) else super().forward(input)


class HostBatchNormAct(_WithActivation, HostBatchNorm):
    """The same of a `timm.layers.BatchNormAct2d`."""


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a module of the model takes statistics over the batch."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def share_statistics(model: nn.Module, on_cpu: bool) -> list[str]:
    """Synchronises every BatchNorm of a model in place; parameters and buffers stay the same.

    Args:
        model: of which BatchNorms of maps and timm's with an activation are replaced, and of a
            `Packed` the visible positions are counted.
        on_cpu: whether it is trained there.

    Returns:
        Classes of BatchNorms that it does not know, which stay those of each process.
    """
    for name, child in list(model.named_modules()):
        made = _synchronised(child, on_cpu)
        if made is not None:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, made)
    left = (m for m in model.modules() if isinstance(m, _BatchNorm) and not _is_synchronised(m))
    return sorted({type(module).__name__ for module in left})


def _is_synchronised(module: nn.Module) -> bool:
    return isinstance(module, nn.SyncBatchNorm | HostBatchNorm)


def _synchronised(module: Any, on_cpu: bool) -> nn.Module | None:
    """What takes the place of a BatchNorm; None if it is none that is known."""
    layers: Any = sys.modules.get("timm.layers")  # else none of its modules is here
    activates = layers is not None and type(module) is layers.BatchNormAct2d
    if type(module) is not nn.BatchNorm2d and not activates:
        return None
    kinds: tuple[Any, Any] = (SyncBatchNorm, SyncBatchNormAct)
    if on_cpu:
        kinds = (HostBatchNorm, HostBatchNormAct)
    made = kinds[activates](
        module.num_features,
        module.eps,
        module.momentum,
        module.affine,
        module.track_running_stats,
    )
    made.weight, made.bias = module.weight, module.bias
    made._buffers.update(module._buffers)
    if activates:
        made.drop, made.act = module.drop, module.act
    return made.train(module.training)
