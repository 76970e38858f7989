"""`convmae info`: versions, devices, what runs the operators, and the models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from convmae.models import create_model, list_models
from convmae.models.cnn.names import PREFIX
from convmae.training.machine import machine_info

if TYPE_CHECKING:
    from convmae.config import InfoConfig


def model_sizes() -> list[tuple[str, int]]:
    """Every model's name and number of parameters, counted without allocating them."""
    sizes = []
    for name in list_models():
        with torch.device("meta"):
            model = create_model(name)
        sizes.append((name, sum(parameter.numel() for parameter in model.parameters())))
    return sizes


def main(config: InfoConfig) -> int:
    """The command: prints what there is to know; returns the exit status."""
    for name, text in machine_info().items():
        print(f"{name:10} {text}")
    print("\nmodel                parameters")
    for name, parameters in model_sizes():
        print(f"{name:20} {parameters / 1e6:8.2f} M")
    print(f"{PREFIX + 'NAME':20} a convolutional network of timm")
    return 0
