"""A step of pretraining without values, before anything is written: what is refused in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from convmae.config import OptionError

if TYPE_CHECKING:
    from convmae.config import PretrainConfig


# What PyTorch and the models say of a BatchNorm that sees a single value of each channel.
SINGLE = ("more than 1 value per channel", "a single value of each channel")


def try_step(model: Any, config: PretrainConfig) -> None:
    """Takes a step of training of a model on the meta device, which computes nothing.

    Args:
        model: the pretraining model, without values.
        config: filled options.

    Raises:
        OptionError: the network has an operation that has no meaning for visible positions, or a
            BatchNorm has a single value for each channel.
    """
    model.train()
    shape = (config.batch_size, model.in_chans, *model.img_size)
    images = torch.zeros(shape, device="meta")
    noise = torch.zeros(config.batch_size, model.num_patches, device="meta")
    try:
        model(images, mask_ratio=config.share_hidden, noise=noise).loss.backward()
    except ValueError as error:
        if not any(words in str(error) for words in SINGLE):
            raise OptionError(f"--model {config.model!r}: {error}") from error
        raise OptionError(
            f"--batch_size {config.batch_size} gives a BatchNorm of {config.model} a single "
            "visible position, of which there is no variance; give a larger batch, larger pictures "
            "(--input_size) or a lower --mask_ratio"
        ) from error
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise OptionError(f"--model {config.model!r}: {error}") from error


def visible_blocks(model: Any) -> int:
    """How many blocks of a picture stay visible."""
    share = model.num_patches * (1 - model.mask_ratio)
    return round(share) if model.mask_rounding == "round" else int(share)
