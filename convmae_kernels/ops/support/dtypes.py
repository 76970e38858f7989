"""The number types of the ops, and those in which they compute."""

from __future__ import annotations

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALF_DTYPES = (torch.bfloat16, torch.float16)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums of `dtype` are computed: float32 for half types, else the same."""
    return torch.float32 if dtype in HALF_DTYPES else dtype
