"""BatchNorms whose mean and variance are those of the batches of all processes."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from convmae_kernels.nn import SyncBatchNorm


class SyncBatchNormAct(SyncBatchNorm):
    """A synchronised `timm.layers.BatchNormAct2d`: its dropout and activation come behind.

    `torch.nn.Identity` each, until `share_statistics` gives it those of the module it replaces.
    """

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Any) -> Any:
        """Like `input`, a `Packed` or a dense map."""
        return self.act(self.drop(super().forward(input)))


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a module of the model takes statistics over the batch."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def share_statistics(model: nn.Module) -> list[str]:
    """Synchronises every BatchNorm of a model in place; parameters and buffers stay the same.

    Args:
        model: of which BatchNorms of maps and timm's with an activation are replaced, and of a
            `Packed` the visible positions are counted.

    Returns:
        Classes of BatchNorms that it does not know, which stay those of each process.
    """
    for name, child in list(model.named_modules()):
        made = _synchronised(child)
        if made is not None:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, made)
    left = (m for m in model.modules() if isinstance(m, _BatchNorm) and not _is_synchronised(m))
    return sorted({type(module).__name__ for module in left})


def _is_synchronised(module: nn.Module) -> bool:
    return isinstance(module, nn.SyncBatchNorm)


def _synchronised(module: nn.Module) -> SyncBatchNorm | None:
    """What takes the place of a BatchNorm; None if it is none that is known."""
    if type(module) is nn.BatchNorm2d:
        return _with_tensors_of(module, SyncBatchNorm)
    layers: Any = sys.modules.get("timm.layers")  # else none of its modules is here
    if layers is None or type(module) is not layers.BatchNormAct2d:
        return None
    made = _with_tensors_of(module, SyncBatchNormAct)
    made.drop, made.act = module.drop, module.act
    return made


def _with_tensors_of(module: Any, kind: type[Any]) -> Any:
    made = kind(
        module.num_features,
        module.eps,
        module.momentum,
        module.affine,
        module.track_running_stats,
    )
    made.weight, made.bias = module.weight, module.bias
    made._buffers.update(module._buffers)
    return made.train(module.training)
