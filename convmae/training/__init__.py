"""Training: `pretrain(PretrainConfig(...))`, and pictures from a checkpoint.

Importing this package imports neither torch nor any extra; asking it for a function does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convmae.training.config import OptionError, PretrainConfig, ReconstructConfig

if TYPE_CHECKING:
    from convmae.training.checkpoint import load_model
    from convmae.training.pretraining import PretrainSummary, TrainingError, pretrain
    from convmae.training.reconstruction import reconstruct

__all__ = [
    "OptionError",
    "PretrainConfig",
    "PretrainSummary",
    "ReconstructConfig",
    "TrainingError",
    "load_model",
    "pretrain",
    "reconstruct",
]

_WHERE = {
    "PretrainSummary": "pretraining",
    "TrainingError": "pretraining",
    "load_model": "checkpoint",
    "pretrain": "pretraining",
    "reconstruct": "reconstruction",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
