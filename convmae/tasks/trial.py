"""A step of pretraining before anything is written: what it is refused for."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from convmae.config import OptionError

if TYPE_CHECKING:
    from convmae.config import PretrainConfig

# What PyTorch and the models say of a BatchNorm that sees a single value of each channel.
SINGLE = ("more than 1 value per channel", "a single value of each channel")
PICTURES = 2  # of a trial that computes


def try_step(model: Any, twin: Any, config: PretrainConfig) -> None:
    """Takes a step of training: without values, and only where PyTorch cannot do that, with them.

    Args:
        model: the pretraining model; it stays as it is.
        twin: the same on the meta device.
        config: filled options.

    Raises:
        OptionError: the network cannot take a step, or a BatchNorm has a single value for each
            channel.
    """
    try:
        _step(twin, config.batch_size, config)
    except Exception as error:
        _check_number(error, config)
        try:
            _step(copy.deepcopy(model), min(config.batch_size, PICTURES), config)
        except Exception as found:
            _check_number(found, config)
            raise OptionError(f"--model {config.model!r} cannot be trained: {found}") from found


def _step(model: Any, pictures: int, config: PretrainConfig) -> None:
    """Forward and backward pass of black pictures."""
    like = next(model.parameters())
    images = torch.zeros(pictures, model.in_chans, *model.img_size, device=like.device)
    noise = torch.zeros(pictures, model.num_patches, device=like.device)
    model.train()
    model(images, mask_ratio=config.share_hidden, noise=noise).loss.backward()


def _check_number(error: Exception, config: PretrainConfig) -> None:
    """Raises `OptionError` where an error says that a BatchNorm had a single value."""
    if any(words in str(error) for words in SINGLE):
        raise OptionError(
            f"--batch_size {config.batch_size} gives a BatchNorm of {config.model} a single "
            "visible position, of which there is no variance; give a larger batch, larger pictures "
            "(--input_size) or a lower --mask_ratio"
        ) from error


def visible_blocks(model: Any) -> int:
    """How many blocks of a picture stay visible."""
    share = model.num_patches * (1 - model.mask_ratio)
    return round(share) if model.mask_rounding == "round" else int(share)
