"""ConvMAE: masked-image pretraining of convolution-transformer hybrids that skips what is hidden.

`create_model`, `load_model` and `list_models` are all that most programs need; each command of the
command line is a function here besides, which takes its options: `pretrain(PretrainConfig(...))`.
Names are imported on first use, so that `import convmae` alone (and `convmae --help`) does not
import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convmae.commands.convert import convert
    from convmae.commands.embed import embed
    from convmae.commands.evaluate import evaluate
    from convmae.commands.inference import RowsSummary
    from convmae.commands.predict import predict
    from convmae.commands.reconstruct import reconstruct
    from convmae.commands.segment_evaluate import segment_evaluate
    from convmae.commands.segment_predict import segment_predict
    from convmae.commands.stats import stats
    from convmae.config import (
        ConvertConfig,
        EmbedConfig,
        EvaluateConfig,
        FinetuneConfig,
        LinprobeConfig,
        OptionError,
        PredictConfig,
        PretrainConfig,
        ReconstructConfig,
        SegmentEvaluateConfig,
        SegmentPredictConfig,
        SegmentTrainConfig,
        StatsConfig,
        WeightsError,
        WeightsWarning,
    )
    from convmae.data import DataError, LoadingError, normalise
    from convmae.models import (
        FCMAE,
        ConvMAE,
        ConvMAEOutput,
        ConvViT,
        FastConvMAE,
        Reconstruction,
        SparK,
        create_model,
        full_name,
        list_models,
    )
    from convmae.models.dense_tasks.detector import Detector, create_detector
    from convmae.models.dense_tasks.segmenter import Segmenter, create_segmenter
    from convmae.records.parts import WriteError
    from convmae.records.report import write_report
    from convmae.tasks.finetune import finetune
    from convmae.tasks.pretrain import pretrain
    from convmae.tasks.probe import linprobe
    from convmae.tasks.segment import segment_train
    from convmae.training.run import RunSummary
    from convmae.training.state import TrainingError
    from convmae.weights.checkpoint import load_model, open_weights
    from convmae.weights.pretrained import load_pretrained

__version__ = "0.1.0"

_MODULES = {
    "commands.convert": ("convert",),
    "commands.embed": ("embed",),
    "commands.evaluate": ("evaluate",),
    "commands.inference": ("RowsSummary",),
    "commands.predict": ("predict",),
    "commands.reconstruct": ("reconstruct",),
    "commands.segment_evaluate": ("segment_evaluate",),
    "commands.segment_predict": ("segment_predict",),
    "commands.stats": ("stats",),
    "config": (
        *("ConvertConfig", "EmbedConfig", "EvaluateConfig", "FinetuneConfig", "LinprobeConfig"),
        *("OptionError", "PredictConfig", "PretrainConfig", "ReconstructConfig", "StatsConfig"),
        *("SegmentEvaluateConfig", "SegmentPredictConfig", "SegmentTrainConfig"),
        *("WeightsError", "WeightsWarning"),
    ),
    "data": ("DataError", "LoadingError", "normalise"),
    "models": (
        *("ConvMAE", "ConvMAEOutput", "ConvViT", "FCMAE", "FastConvMAE", "Reconstruction"),
        *("SparK", "create_model", "full_name", "list_models"),
    ),
    "models.dense_tasks.detector": ("Detector", "create_detector"),
    "models.dense_tasks.segmenter": ("Segmenter", "create_segmenter"),
    "records.parts": ("WriteError",),
    "records.report": ("write_report",),
    "tasks.finetune": ("finetune",),
    "tasks.pretrain": ("pretrain",),
    "tasks.probe": ("linprobe",),
    "tasks.segment": ("segment_train",),
    "training.run": ("RunSummary",),
    "training.state": ("TrainingError",),
    "weights.checkpoint": ("load_model", "open_weights"),
    "weights.pretrained": ("load_pretrained",),
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "ConvMAE",
    "ConvMAEOutput",
    "ConvViT",
    "ConvertConfig",
    "DataError",
    "Detector",
    "EmbedConfig",
    "EvaluateConfig",
    "FCMAE",
    "FastConvMAE",
    "FinetuneConfig",
    "LinprobeConfig",
    "LoadingError",
    "OptionError",
    "PredictConfig",
    "PretrainConfig",
    "Reconstruction",
    "ReconstructConfig",
    "RowsSummary",
    "RunSummary",
    "SegmentEvaluateConfig",
    "SegmentPredictConfig",
    "SegmentTrainConfig",
    "Segmenter",
    "SparK",
    "StatsConfig",
    "TrainingError",
    "WeightsError",
    "WeightsWarning",
    "WriteError",
    "__version__",
    "convert",
    "create_detector",
    "create_model",
    "create_segmenter",
    "embed",
    "evaluate",
    "finetune",
    "full_name",
    "linprobe",
    "list_models",
    "load_model",
    "load_pretrained",
    "normalise",
    "open_weights",
    "predict",
    "pretrain",
    "reconstruct",
    "register_timm",
    "segment_evaluate",
    "segment_predict",
    "segment_train",
    "stats",
    "write_report",
]


def register_timm() -> None:
    """Makes `timm.create_model("convvit_base", ...)` and its like work: see `timm_models`.

    timm cannot find models of other packages by itself. Calling it again does nothing.

    Raises:
        ModuleNotFoundError: timm is not installed.
    """
    import_module("convmae.models.timm_models")


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"convmae.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
