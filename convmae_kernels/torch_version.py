"""Importing this raises an ImportError where torch is too old for the package."""

from __future__ import annotations

import re

import torch

# The library is compiled for the stable ABI of this version; also in pyproject.toml and setup.py.
OLDEST_TORCH = (2, 11)


def why_too_old(version: str) -> str | None:
    """Why a version of torch, such as "2.10.0+cu128", does not do; None if it does."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) >= OLDEST_TORCH:
        return None
    oldest = ".".join(map(str, OLDEST_TORCH))
    return (
        f"convmae_kernels needs torch {oldest} or newer, found torch {version} in "
        f"{torch.__file__}: `pip install 'torch>={oldest}'`"
    )


if (reason := why_too_old(torch.__version__)) is not None:
    raise ImportError(reason)
