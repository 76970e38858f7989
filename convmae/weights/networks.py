"""State dicts of timm's networks: which part of a pretraining model's is the network's own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from convmae.config import WeightsError
from convmae.models.adapt import adapt_network
from convmae.models.cnn.classifier import TimmClassifier
from convmae.models.cnn.masked_cnn import MaskedCNN
from convmae.models.cnn.names import PREFIX, is_timm_name
from convmae.weights.foreign import few

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from convmae.weights.checkpoint import Weights
    from convmae.weights.foreign import ForeignWeights

# What the names of the network's tensors begin with in a pretraining model, by its method.
PREFIXES = {"spark": "sparse_encoder.sp_cnn.", "fcmae": "encoder."}
_WIDTHS = ("dense_decoder.dec.0.up_sample.weight", "mask_token")  # whose shape the width tells
BEHIND_MAPS = "head."  # of timm's networks
COUNTER = ".num_batches_tracked"  # of a BatchNorm; not in every file


@dataclass
class NetworkState:
    """What `network_state` found.

    Attributes:
        state: tensors by the names that the model has for them.
        names: for each of these names, that of the file.
        others: names of the file's tensors that are not in `state`.
        channels: of the pictures that the file is of; None if nothing tells.
        adapted: how the first convolutions were fitted to the model's; None if they did not need
            it.
    """

    state: dict[str, Tensor]
    names: dict[str, str]
    others: list[str]
    channels: int | None
    adapted: str | None


def encoder_weights(weights: Weights) -> Weights:
    """The network that a run pretrained, as a classifier without classes; others as they are.

    Args:
        weights: of any model.
    """
    prefix = PREFIXES.get(weights.config.get("method", ""))
    if not is_timm_name(weights.model) or prefix is None:
        return weights
    state = {k.removeprefix(prefix): v for k, v in weights.state.items() if k.startswith(prefix)}
    config: dict[str, Any] = {"num_classes": 0}
    for key in ("img_size", "in_chans", "output_stride"):
        if weights.config.get(key) is not None:
            config[key] = weights.config[key]
    return replace(weights, config=config, state=state)


def network_of(model: nn.Module) -> nn.Module:
    """timm's own module of a classifier or of a pretraining model."""
    return model.network if isinstance(model, MaskedCNN) else model


def network_prefix(model: nn.Module) -> str:
    """What the names of the network's tensors begin with in a model."""
    network = network_of(model)
    name = next(name for name, module in model.named_modules() if module is network)
    return f"{name}." if name else ""


def network_state(model: nn.Module, found: ForeignWeights, adapt_input: str) -> NetworkState:
    """The tensors of a file by the names that `model` has for them, fitted to its channels.

    The network's own are all there; the decoder's only where the file is of the same method, and
    the classifier's as the file has them.

    Raises:
        WeightsError: the file is of another network.
        ValueError: `adapt_input` is none of its kinds.
    """
    _check_name(model, found)
    source: Mapping[str, Tensor] = found.state if found.ours is None else found.ours.state
    before, now = _prefix_in(source, found.ours), network_prefix(model)
    own = model.state_dict()
    heads = tuple(now + head for head in head_prefixes(model))
    names = {now + k.removeprefix(before): k for k in source if k.startswith(before)}
    # Pretraining files lack what is behind the maps, such as the norm before a classifier.
    behind = (*heads, now + BEHIND_MAPS)
    needed = [k for k in own if k.startswith(now) and not k.startswith(behind)]
    absent = [k for k in needed if k not in names and not k.endswith(COUNTER)]
    strange = [names[k] for k in names if k not in own and not k.startswith(behind)]
    if strange or absent:
        what = f"lacks {few(absent)}" if absent else f"has {few(strange)} besides"
        raise WeightsError(
            f"{found.path} is of another network ({network_in(found)}) than {_name(model)}: it "
            f"{what}"
        )
    if before and before == now and _same_width(source, own):  # the decoder too
        names |= {key: key for key in source if not key.startswith(before)}
    state = {name: _shaped(source[key], own.get(name)) for name, key in names.items()}
    channels = _channels(model, found, state, now)
    adapted = None if channels is None else adapt_network(state, own, channels, adapt_input)
    read = set(names.values())
    others = [key for key in source if key not in read]
    return NetworkState(state, names, others, channels, adapted)


def _same_width(source: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    """Whether the decoder of a file is as wide as the model's, as far as the file has one."""
    there = [name for name in _WIDTHS if name in source and name in own]
    return all(source[name].shape == own[name].shape for name in there)


def _shaped(value: Tensor, own: Tensor | None) -> Tensor:
    """A linear layer `[D, C]` as the convolution of 1 x 1 that the model has, and back."""
    if own is None or value.numel() != own.numel() or {value.dim(), own.dim()} != {2, 4}:
        return value
    return value.reshape(own.shape) if value.shape[:2] == own.shape[:2] else value


def network_in(found: ForeignWeights) -> str:
    """What tells the network of a file, in words."""
    if found.ours is not None:
        return found.ours.model
    arch = found.options.get("arch")
    if isinstance(arch, str):
        return f"{arch[:80]}, by its entry 'arch'"
    return f"{len(found.state)} tensors: {few(found.state, 3)}"


def method_in(found: ForeignWeights) -> str:
    """`spark`, `fcmae`, or nothing for a network alone."""
    source = found.state if found.ours is None else found.ours.state
    prefix = _prefix_in(source, found.ours)
    return next((method for method, own in PREFIXES.items() if own == prefix), "")


def bare_name(key: str) -> str:
    """The name of a tensor without what it begins with in a pretraining model."""
    return key.removeprefix(PREFIXES["spark"]).removeprefix(PREFIXES["fcmae"])


def head_prefixes(model: nn.Module) -> tuple[str, ...]:
    """What the names of the classifier's tensors begin with in a network of timm."""
    described: Any = getattr(network_of(model), "pretrained_cfg", None) or {}
    named = described.get("classifier") or ()
    names = {f"{name}." for name in ((named,) if isinstance(named, str) else named)}
    if isinstance(model, TimmClassifier) and model.num_classes:
        names.add(model.head_prefix)
    return tuple(sorted(names))


def _prefix_in(source: Mapping[str, Tensor], ours: Weights | None) -> str:
    """What the names of the network's tensors begin with in a file."""
    if ours is not None:
        return PREFIXES.get(ours.config.get("method", ""), "")
    if any(key.startswith(PREFIXES["spark"]) for key in source):
        return PREFIXES["spark"]
    fcmae = "mask_token" in source and any(key.startswith(PREFIXES["fcmae"]) for key in source)
    return PREFIXES["fcmae"] if fcmae else ""


def _name(model: nn.Module) -> str:
    """The name of a model's network, `timm:resnet50`."""
    described: Any = getattr(network_of(model), "pretrained_cfg", None) or {}
    name = described.get("architecture")
    return "the model" if name is None else f"{PREFIX}{name}"


def _check_name(model: nn.Module, found: ForeignWeights) -> None:
    """Raises `WeightsError` where a file of ours is of a network of another name.

    Names of tensors and their shapes do not tell all networks apart: resnetaa50 and resnetblur50
    have the same.
    """
    if found.ours is None:
        return
    theirs, mine = found.ours.model.partition(".")[0], _name(model)
    if not is_timm_name(theirs) or (is_timm_name(mine) and theirs != mine):
        raise WeightsError(
            f"{found.path} is of {found.ours.model}, but the model is {mine}; give weights of "
            f"{mine}" + (f", or --model {theirs}" if is_timm_name(theirs) else "")
        )


def _channels(
    model: nn.Module, found: ForeignWeights, state: Mapping[str, Tensor], prefix: str
) -> int | None:
    """Channels of the pictures that a file is of; None if nothing tells."""
    if found.ours is not None:
        return found.ours.config.get("in_chans", 3)
    described: Any = getattr(network_of(model), "pretrained_cfg", None) or {}
    named = described.get("first_conv") or ()
    for name in (named,) if isinstance(named, str) else named:
        weight = state.get(f"{prefix}{name}.weight")
        if weight is not None and weight.dim() == 4:
            return weight.shape[1]
    return None
