"""Small models and pictures for the tests of `predict` and `embed`, and what must come out."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from convmae import EmbedConfig, PredictConfig, create_model, normalise, open_weights
from convmae.data import Statistics
from convmae.weights.checkpoint import save_weights
from tests.support.training_runs import DEVICE

if TYPE_CHECKING:
    from pathlib import Path

Image = pytest.importorskip("PIL.Image")

CLASSES = ("cat", 'dog, "big"', "line\nbreak")
STATISTICS = Statistics((0.5, 0.4, 0.6), (0.2, 0.3, 0.25))


def classifier(folder: Path, classes: Any = CLASSES, **config: Any) -> Path:
    """A classifier of random weights that are large enough for its answers to differ."""
    values: dict[str, Any] = {"img_size": 32, "num_classes": 3} | config
    torch.manual_seed(0)
    model = create_model("convvit_tiny", **values)
    if model.num_classes:
        torch.nn.init.normal_(model.get_classifier().weight)
    channels = values.get("in_chans", 3)
    statistics = STATISTICS if channels == 3 else Statistics((0.5,) * channels, (0.2,) * channels)
    save_weights(folder, model, "convvit_tiny", pictures=statistics, classes=classes)
    return folder


def pretrained(folder: Path, name: str = "convmae_tiny") -> Path:
    """A pretraining model of random weights."""
    torch.manual_seed(0)
    model = create_model(name, img_size=(32, 48))
    save_weights(folder, model, name, pictures=STATISTICS)
    return folder


def draw(path: Path, number: int, size: tuple[int, int] = (48, 40)) -> Path:
    """A picture that its number decides."""
    rng = np.random.default_rng(number)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(size).save(path)
    return path


def predicting(checkpoint: Path, data: Any, **changes: Any) -> PredictConfig:
    return PredictConfig(**(_options(checkpoint, data) | changes))


def embedding(checkpoint: Path, data: Any, **changes: Any) -> EmbedConfig:
    return EmbedConfig(**(_options(checkpoint, data) | changes))


def _options(checkpoint: Path, data: Any) -> dict[str, Any]:
    return {
        "checkpoint": str(checkpoint),
        "data_path": data if isinstance(data, tuple) else str(data),
        "batch_size": 4,
        "num_workers": 0,
        "device": DEVICE,
        "amp": "float32",
    }


def table(text: str) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    return list(csv.DictReader(io.StringIO(text, newline="")))


def plain_images(paths: list[Path], size: tuple[int, int]) -> torch.Tensor:
    """What a program of one's own would do with picture files: `[N, 3, H, W]`, uint8."""
    from torchvision.transforms import InterpolationMode, v2

    images = []
    for path in paths:
        with Image.open(path) as opened:
            image = torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1)
        tall, wide = (round(side / 0.875) for side in size)
        height, width = image.shape[1:]
        factor = max(tall / height, wide / width)
        new = [max(tall, int(height * factor)), max(wide, int(width * factor))]
        resize = v2.Resize(new, InterpolationMode.BICUBIC, antialias=True)
        images.append(v2.CenterCrop(size)(resize(image)))
    return torch.stack(images)


def plain_logits(checkpoint: Path, paths: list[Path]) -> torch.Tensor:
    """The logits of picture files, in a loop over them one by one."""
    weights = open_weights(checkpoint)
    model = weights.build_model()
    images = normalise(plain_images(paths, model.img_size), *weights.statistics)
    with torch.no_grad():
        return torch.cat([model(image[None]) for image in images])
