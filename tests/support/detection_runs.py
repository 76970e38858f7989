"""Small trainings of detectors, for tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convmae.config import DetectTrainConfig

if TYPE_CHECKING:
    from pathlib import Path

SMALL: dict[str, Any] = {
    "model": "convvit_tiny",
    "input_size": 64,
    "window_size": 2,
    "width": 16,
    "norm": "group",
    "anchor_sizes": (8.0, 16.0, 24.0, 32.0, 48.0),
    "canonical_size": 32.0,
    "rpn_convs": 1,
    "rpn_batch_size_per_image": 32,
    "rpn_post_nms_top_n_train": 40,
    "rpn_post_nms_top_n_test": 20,
    "box_convs": 1,
    "box_features": 32,
    "box_batch_size_per_image": 16,
    "box_score_thresh": 0.0,
    "box_detections_per_img": 10,
    "mask_convs": 1,
    "mask_batch_size_per_image": 4,
    "batch_size": 2,
    "steps": 4,
    "epochs": 1,
    "warmup_epochs": 0.0,
    "warmup_lr": 0.0,
    "lr": 1e-3,
    "log_every": 1,
    "num_workers": 0,
    "amp": "float32",
    "device": "cpu",
}


def detection_config(data: Path, output: Path, **changes: Any) -> DetectTrainConfig:
    """Options of a training of seconds on the made pictures in `data`."""
    paths = {"data_path": str(data), "output_dir": str(output)}
    return DetectTrainConfig(**(SMALL | paths | changes))
