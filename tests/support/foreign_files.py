"""Files of weights as other code writes them, and their conversion, for the tests of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import convmae
from convmae.commands.convert import ConversionReport, convert
from convmae.config import ConvertConfig, OptionError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

pytest.importorskip("safetensors")


def official(name: str = "convmae_tiny", size: Any = 64, **options: Any) -> dict[str, Tensor]:
    """A random state dict; its keys and shapes are the official code's."""
    model = convmae.create_model(name, img_size=size, **options)
    state = dict(model.state_dict())
    for key, value in state.items():
        if "pos_embed" not in key or name.startswith("convvit"):
            state[key] = torch.randn_like(value)
    return state


def encoder_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is in the released file."""
    stripped = ("decoder_", "mask_token", "stage")
    return {key: value for key, value in state.items() if not key.startswith(stripped)}


def save(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def run(checkpoint: Path, output: Path, **options: Any) -> ConversionReport:
    report = convert(ConvertConfig(str(checkpoint), str(output), **options))
    assert isinstance(report, ConversionReport)
    return report


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left
    )


def refused(checkpoint: Path, **options: Any) -> str:
    """The message of the error; that nothing was written."""
    output = checkpoint.parent / "refused" / "model.safetensors"
    with pytest.raises(OptionError) as error:
        run(checkpoint, output, **options)
    assert not output.parent.exists()
    return str(error.value)
