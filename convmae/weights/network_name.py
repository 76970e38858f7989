"""Which of timm's networks a file of weights is of."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from convmae.config import WeightsError
from convmae.models.cnn.names import PREFIX, timm_name
from convmae.weights.architecture import blank
from convmae.weights.foreign import ENCODER
from convmae.weights.networks import COUNTER, PREFIXES, method_in, network_in, network_state

if TYPE_CHECKING:
    from collections.abc import Mapping

    from convmae.weights.foreign import ForeignWeights

LONGEST_NAME = 80
_OF_CONVMAE = (*ENCODER, "decoder_pos_embed")
# Networks that official files are of. Many others of timm have the tensors of a ResNet, too.
_RESNETS = tuple(f"resnet{depth}" for depth in (18, 26, 34, 50, 101, 152, 200))
_CONVNEXTS = tuple(f"convnext_{size}" for size in ("tiny", "small", "base", "large", "xlarge"))
_CONVNEXTS_V2 = tuple(
    f"convnextv2_{size}"
    for size in ("atto", "femto", "pico", "nano", "tiny", "base", "large", "huge")
)


def holds_network(found: ForeignWeights) -> bool:
    """Whether the tensors of other code are of a convolutional network, not of a ConvMAE."""
    convolutions = any(value.dim() == 4 for value in found.state.values())
    return convolutions and not any(key.startswith(_OF_CONVMAE) for key in found.state)


def network_name(found: ForeignWeights) -> str:
    """The name of a file's network, `timm:resnet50`, as the file or the shapes in it tell.

    Raises:
        WeightsError: nothing tells it; the message names networks that would fit.
    """
    told = told_name(found)
    if told is not None:
        return told
    fitting = _fitting(found)
    is_resnet = any(name in _RESNETS for name in fitting)
    if len(fitting) == 1 and (method_in(found) or not is_resnet):
        return PREFIX + fitting[0]
    choices = " or ".join(f"--model {PREFIX}{name}" for name in fitting)
    raise WeightsError(
        f"--model is needed: {found.path} seems to be of a convolutional network "
        f"({network_in(found)}), and nothing in it tells which of timm's; "
        + (f"its tensors fit {choices}, and others" if choices else f"give --model {PREFIX}NAME")
    )


def told_name(found: ForeignWeights) -> str | None:
    """The name that a file says; None if it says none that timm has."""
    if found.ours is not None:
        return found.ours.model
    arch = found.options.get("arch")
    try:
        known = isinstance(arch, str) and len(arch) <= LONGEST_NAME
        return PREFIX + timm_name(f"{PREFIX}{arch}") if known else None
    except ValueError:
        return None


def _fitting(found: ForeignWeights) -> list[str]:
    """Known networks that have the names and shapes of a file."""
    prefix = PREFIXES.get(method_in(found), "")
    sizes = {k.removeprefix(prefix): v.numel() for k, v in found.state.items()}
    candidates: tuple[str, ...]
    if "stem.0.weight" in sizes:
        candidates = _CONVNEXTS_V2 if any(".grn." in key for key in sizes) else _CONVNEXTS
    else:
        candidates = _RESNETS if "layer1.0.conv1.weight" in sizes else ()
    fitting = []
    for name in candidates:
        if not _may_be(name, sizes):
            continue
        model = blank(PREFIX + name, num_classes=0, in_chans=channels_of(found, PREFIX + name))
        try:
            state = network_state(model, found, "auto").state
        except WeightsError:
            continue
        own = model.state_dict()
        if all(own[key].shape == value.shape for key, value in state.items() if key in own):
            fitting.append(name)
    return fitting


def _may_be(name: str, sizes: Mapping[str, int]) -> bool:
    """Whether tensors have as many numbers as those of a network, but for the stem and the end."""
    return all(sizes.get(key, 0) == size for key, size in _sizes_of(name).items())


@functools.cache  # building a network takes longer than all that is done with its sizes
def _sizes_of(name: str) -> dict[str, int]:
    """How many numbers each tensor of a network has, without the stem, the end and counters."""
    import timm

    with torch.device("meta"):
        own = timm.create_model(name, num_classes=0).state_dict()
    return {
        key: value.numel()
        for key, value in own.items()
        if not key.startswith(("stem.", "conv1.", "head.", "norm")) and not key.endswith(COUNTER)
    }


def channels_of(found: ForeignWeights, name: str) -> int:
    """Channels of the pictures, from the first convolution."""
    import timm

    prefix = PREFIXES.get(method_in(found), "")
    described: Any = timm.get_pretrained_cfg(name.removeprefix(PREFIX))
    first = getattr(described, "first_conv", None) or ()
    for layer in (first,) if isinstance(first, str) else first:
        weight = found.state.get(f"{prefix}{layer}.weight")
        if weight is not None and weight.dim() == 4:
            return weight.shape[1]
    return 3
