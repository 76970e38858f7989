"""The options of the commands, their defaults and what they must satisfy. Imports no torch."""

from convmae.config.checks import (
    check_mask_ratio,
    check_number,
    check_patches,
    config_from_mapping,
    config_to_mapping,
    suggest,
)
from convmae.config.classify import EvaluateConfig, FinetuneConfig, LinprobeConfig
from convmae.config.convert import ConvertConfig
from convmae.config.data import DataConfig, ReadOptions
from convmae.config.detect import (
    DetectConvertConfig,
    DetectEvaluateConfig,
    DetectPredictConfig,
    DetectTrainConfig,
)
from convmae.config.errors import (
    MessageError,
    OptionError,
    WeightsError,
    WeightsWarning,
    for_option,
)
from convmae.config.inference import EmbedConfig, InferenceConfig, PredictConfig, RowsConfig
from convmae.config.pretrain import PretrainConfig
from convmae.config.run import RunConfig
from convmae.config.segment import (
    SegmentEvaluateConfig,
    SegmentPredictConfig,
    SegmentTrainConfig,
)
from convmae.config.tools import InfoConfig, ReconstructConfig, StatsConfig
from convmae.config.yaml_file import read_yaml

# By the names that runs note: what each kind of training can be asked.
TRAINING_OPTIONS: dict[str, type[RunConfig]] = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "linprobe": LinprobeConfig,
    "detect train": DetectTrainConfig,
    "segment train": SegmentTrainConfig,
}

__all__ = [
    "TRAINING_OPTIONS",
    "ConvertConfig",
    "DataConfig",
    "DetectConvertConfig",
    "DetectEvaluateConfig",
    "DetectPredictConfig",
    "DetectTrainConfig",
    "EmbedConfig",
    "EvaluateConfig",
    "FinetuneConfig",
    "InferenceConfig",
    "InfoConfig",
    "MessageError",
    "LinprobeConfig",
    "OptionError",
    "PredictConfig",
    "PretrainConfig",
    "ReadOptions",
    "ReconstructConfig",
    "RowsConfig",
    "RunConfig",
    "SegmentEvaluateConfig",
    "SegmentPredictConfig",
    "SegmentTrainConfig",
    "StatsConfig",
    "WeightsError",
    "WeightsWarning",
    "check_mask_ratio",
    "check_number",
    "check_patches",
    "config_from_mapping",
    "config_to_mapping",
    "for_option",
    "read_yaml",
    "suggest",
]
