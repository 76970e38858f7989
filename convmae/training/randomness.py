"""Seeds of what is random within a step, so that a step does not depend on those before it."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np
import torch

from convmae.data import derive_seed

if TYPE_CHECKING:
    from torch import Tensor

MASK_STREAM = 2  # keeps the seeds of the masks apart from all others


def seed_everything(seed: int) -> None:
    """Seeds PyTorch on every device, NumPy and `random`: stochastic depth, mixup and erasing."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def mask_noise(keys: Tensor, patches: int, seed: int) -> Tensor:
    """Uniform noise `[N, patches]` on the CPU, a row from `(seed, *keys[n])` alone.

    A sample's mask does not depend on its batch, so neither on how many processes share it.

    Args:
        keys: int64 `[N, K]` on the CPU, non-negative.
        patches: how many numbers in a row.
        seed: of the run.
    """
    generator = torch.Generator()
    rows = []
    for key in keys.tolist():
        generator.manual_seed(derive_seed(seed, MASK_STREAM, *key))
        rows.append(torch.rand(patches, generator=generator))
    return torch.stack(rows)
