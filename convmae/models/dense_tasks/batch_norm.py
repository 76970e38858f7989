"""BatchNorms that train on small maps of one picture too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def batch_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """`norm(x)`, of a BatchNorm or of what has taken its place.

    A batch with one value for each channel, as a map of 1 x 1 of one picture has, has no variance.
    In training it is normalised by the running statistics, which stay as they are: PyTorch raises
    an error there.

    Args:
        norm: with affine parameters and running statistics.
        x: `[N, C, H, W]`.
    """
    values = x.shape[0] * x.shape[2] * x.shape[3]
    if not norm.training or values != 1 or _shares_statistics(norm):
        return norm(x)
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    statistics = (norm.running_mean, norm.running_var)
    return F.batch_norm(x, *statistics, norm.weight, norm.bias, training=False, eps=norm.eps)


def _shares_statistics(norm: nn.Module) -> bool:
    """Whether a BatchNorm was replaced by one that takes the statistics of several processes."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not together or type(norm) is nn.BatchNorm2d:
        return False
    return torch.distributed.get_world_size() > 1
