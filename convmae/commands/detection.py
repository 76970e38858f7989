"""What `convmae detect evaluate` and `detect predict` share: a detector from its checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from convmae.config import OptionError, WeightsError, for_option
from convmae.models.dense_tasks.detector import Detector
from convmae.models.task_names import DETECT
from convmae.tasks.detection_steps import padding_of
from convmae.training.machine import pick_dtype
from convmae.weights.checkpoint import open_weights

if TYPE_CHECKING:
    import torch

    from convmae.config.detect import DetectInferenceConfig
    from convmae.data import Statistics
    from convmae.data.classes import ClassNames
    from convmae.weights.checkpoint import Weights


@dataclass
class LoadedDetector:
    """A detector on its device, and how pictures are brought to it."""

    weights: Weights
    model: Any
    classes: ClassNames
    statistics: Statistics
    size: tuple[int, int]  # height and width of the canvas
    padding: str
    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> torch.autocast:
        """The arithmetic of `--amp`."""
        import torch

        half = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype if half else None, enabled=half)


def load_detector(config: DetectInferenceConfig, device: torch.device) -> LoadedDetector:
    """The detector of `--checkpoint`, with the thresholds that are given.

    Raises:
        OptionError: there is none, or it does not tell the names of its classes.
    """
    with for_option("checkpoint"):
        weights = open_weights(config.checkpoint)
        if not weights.model.startswith(DETECT):
            raise WeightsError(
                f"{weights.path} is a {weights.model}, which does not detect objects; expected "
                "what `convmae detect train` wrote"
            )
        model: Any = weights.build_model(device)
        statistics = weights.statistics
        if weights.classes is None:
            raise WeightsError(f"{weights.path} does not tell the names of its classes")
        if len(weights.classes) != model.num_classes:
            raise WeightsError(
                f"{weights.path} names {len(weights.classes)} classes, but its model has "
                f"{model.num_classes}"
            )
    if not isinstance(model, Detector):
        raise OptionError(f"--checkpoint {config.checkpoint!r} is a {type(model).__name__}")
    for name, value in config.thresholds().items():
        setattr(model.roi_heads, name.removeprefix("box_"), value)
    side = weights.config["img_size"]
    size = config.size or ((side, side) if isinstance(side, int) else tuple(side))
    dtype, _ = pick_dtype(config.amp, device)
    padding = padding_of(weights.config.get("kind", "detection"))
    return LoadedDetector(weights, model, weights.classes, statistics, size, padding, device, dtype)
