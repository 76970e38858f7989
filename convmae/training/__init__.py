"""Training: `pretrain(PretrainConfig(...))`, `finetune`, `linprobe`, and what goes with them.

Importing this package imports neither torch nor any extra; asking it for a function does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convmae.training.config import (
    ConvertConfig,
    EvaluateConfig,
    FinetuneConfig,
    LinprobeConfig,
    OptionError,
    PretrainConfig,
    ReconstructConfig,
    StatsConfig,
)

if TYPE_CHECKING:
    from convmae.training.checkpoint import load_model
    from convmae.training.conversion import convert
    from convmae.training.engine import TrainingError
    from convmae.training.evaluation import evaluate
    from convmae.training.finetuning import finetune, linprobe
    from convmae.training.pretraining import pretrain
    from convmae.training.reconstruction import reconstruct
    from convmae.training.report import write_report
    from convmae.training.running import RunSummary
    from convmae.training.statistics import stats

_WHERE = {
    "RunSummary": "running",
    "TrainingError": "engine",
    "convert": "conversion",
    "evaluate": "evaluation",
    "finetune": "finetuning",
    "linprobe": "finetuning",
    "load_model": "checkpoint",
    "pretrain": "pretraining",
    "reconstruct": "reconstruction",
    "stats": "statistics",
    "write_report": "report",
}

__all__ = [
    "ConvertConfig",
    "EvaluateConfig",
    "FinetuneConfig",
    "LinprobeConfig",
    "OptionError",
    "PretrainConfig",
    "ReconstructConfig",
    "RunSummary",
    "StatsConfig",
    "TrainingError",
    "convert",
    "evaluate",
    "finetune",
    "linprobe",
    "load_model",
    "pretrain",
    "reconstruct",
    "stats",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
