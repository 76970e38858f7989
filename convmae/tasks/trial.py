"""A step of pretraining without values, before anything is written: what is refused in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from convmae.config import OptionError

if TYPE_CHECKING:
    from convmae.config import PretrainConfig


def try_step(model: Any, pictures: int, config: PretrainConfig) -> list[str]:
    """Takes a step of a model on the meta device, which computes nothing.

    Args:
        model: the pretraining model, without values.
        pictures: of the batch that a BatchNorm sees.
        config: filled options.

    Returns:
        Names of the parameters that the loss does not depend on, such as those of a layer behind
        the last map.

    Raises:
        OptionError: the network has an operation that has no meaning for visible positions, or a
            BatchNorm has a single value for each channel.
    """
    model.train()
    shape = (pictures, model.in_chans, *model.img_size)
    images = torch.zeros(shape, device="meta")
    noise = torch.zeros(pictures, model.num_patches, device="meta")
    try:
        model(images, mask_ratio=config.share_hidden, noise=noise).loss.backward()
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise OptionError(f"--model {config.model!r}: {error}") from error
        raise OptionError(
            f"--batch_size {config.batch_size} gives a BatchNorm of {config.model} a single "
            "visible position, of which there is no variance; give a larger batch, larger pictures "
            "(--input_size) or a lower --mask_ratio"
        ) from error
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise OptionError(f"--model {config.model!r}: {error}") from error
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def visible_blocks(model: Any) -> int:
    """How many blocks of a picture stay visible."""
    share = model.num_patches * (1 - model.mask_ratio)
    return round(share) if model.mask_rounding == "round" else int(share)
