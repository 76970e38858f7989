"""Files of timm's networks, pretrained or not, as weights of a model of ours, in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from convmae.config import OptionError
from convmae.config.checks import as_pair
from convmae.models.cnn.names import PREFIX, is_timm_name, timm_name
from convmae.models.registry import create_model
from convmae.weights.architecture import blank, shape_of
from convmae.weights.configuration import count_blocks
from convmae.weights.network_name import channels_of, holds_network, network_name, told_name
from convmae.weights.networks import (
    COUNTER,
    PREFIXES,
    encoder_weights,
    head_prefixes,
    method_in,
    network_in,
    network_state,
)
from convmae.weights.pretrained import check_shapes

if TYPE_CHECKING:
    from torch import Tensor

    from convmae.config import ConvertConfig
    from convmae.weights.foreign import ForeignWeights

NETWORK_KINDS = ("spark", "fcmae", "network")
STRIDE = 32  # of the networks in official files
LARGEST_SIDE = 4096  # pixels
_DECODERS = {"spark": "dense_decoder.", "fcmae": "mask_token"}


def is_of_network(config: ConvertConfig, found: ForeignWeights) -> bool:
    """Whether a file is of a convolutional network, not of a ConvMAE."""
    if found.ours is not None:
        return is_timm_name(found.ours.model)
    if is_timm_name(config.model or "") or config.kind in NETWORK_KINDS:
        return True
    return holds_network(found)


def network_weights(
    config: ConvertConfig, found: ForeignWeights
) -> tuple[str, str, dict[str, Any], dict[str, Tensor], list[str]]:
    """What to write of a file of a network.

    Returns:
        Kind (`spark`, `fcmae` or `network`), name, configuration, state dict, and the names of its
        tensors that are not in the file: freshly initialised.

    Raises:
        OptionError, WeightsError: an option does not fit the file, or it is of another network, or
            of none that is known.
    """
    kind = _kind(config, found)
    name = _name(config, found)
    arguments = _arguments(config, found, kind, name)
    model = blank(name, **arguments)
    fitted = network_state(model, found, "auto")
    own = model.state_dict()
    shapes = {key: tuple(value.shape) for key, value in own.items()}
    state = {key: fitted.state[key] for key in own if key in fitted.state}
    what = f"{name} (the file: {network_in(found)})"
    check_shapes(state, shapes, found, what)
    missing = [key for key in own if key not in state]
    if missing:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            fresh = create_model(name, **arguments).state_dict()
        state |= {key: fresh[key] for key in missing}
    ordered = {key: state[key].clone(memory_format=torch.contiguous_format) for key in own}
    counters = [key for key in missing if key.endswith(COUNTER)]
    return kind, name, model.config, ordered, [key for key in missing if key not in counters]


def _kind(config: ConvertConfig, found: ForeignWeights) -> str:
    """What to write."""
    method = method_in(found)
    if config.kind not in ("auto", *NETWORK_KINDS):
        raise OptionError(
            f"--kind {config.kind} is of ConvMAE, but {found.path} is of a convolutional network: "
            f"{network_in(found)}; expected "
            f"{', '.join(('auto', *NETWORK_KINDS))}"
        )
    if config.format == "timm":
        if config.kind in PREFIXES:
            raise OptionError(
                f"--format timm and --kind {config.kind} contradict: timm has the network alone"
            )
        return "network"
    if config.format == "spark" and config.kind not in ("auto", "spark"):
        raise OptionError(f"--format spark and --kind {config.kind} contradict")
    if config.format == "spark" and method == "fcmae" and config.kind == "auto":
        raise OptionError(
            f"--format spark: {found.path} is of FCMAE, whose decoder is another; --kind spark "
            "takes its network with a fresh decoder, --format timm the network alone"
        )
    if config.format == "spark":
        return "spark"
    if config.kind != "auto":
        return config.kind
    source = found.state if found.ours is None else found.ours.state
    has_decoder = method and any(key.startswith(_DECODERS[method]) for key in source)
    return method if has_decoder else "network"


def _name(config: ConvertConfig, found: ForeignWeights) -> str:
    """The network's name: as the file, its shapes or `--model` tell."""
    if config.model is not None:
        told = told_name(found)
        if not is_timm_name(config.model):
            raise OptionError(
                f"--model {config.model!r} is of ConvMAE, but --checkpoint {config.checkpoint!r} "
                f"is of a convolutional network: {network_in(found)}; expected {PREFIX}NAME"
                + (f", {told}" if told else "")
            )
        _check_name(config.model)
        if told is not None and told != config.model:
            raise OptionError(
                f"--model {config.model!r}, but --checkpoint {config.checkpoint!r} is of {told}"
            )
        return config.model
    return network_name(found)


def _check_name(name: str) -> None:
    try:
        timm_name(name)
    except (ValueError, ModuleNotFoundError) as error:
        raise OptionError(f"--model {name!r}: {error}") from error


def _arguments(
    config: ConvertConfig, found: ForeignWeights, kind: str, name: str
) -> dict[str, Any]:
    """All arguments of the model to write."""
    arguments = _stored(found, kind)
    if arguments is None:
        arguments = {"img_size": _side(found), "in_chans": channels_of(found, name)}
        if kind == "network":
            arguments["num_classes"] = _classes(found, name)
        else:
            reader = _read_spark if kind == "spark" else _read_fcmae
            arguments |= {"method": kind} | reader(found)
    if config.input_size is not None:
        arguments["img_size"] = as_pair(config.input_size)
    given = config.norm_pix_loss
    if kind != "network" and given is not None:
        arguments["norm_pix_loss"] = given
    return {key: tuple(v) if isinstance(v, list) else v for key, v in arguments.items()}


def _stored(found: ForeignWeights, kind: str) -> dict[str, Any] | None:
    """The configuration in a file of ours, if it is of the kind to write."""
    if found.ours is None:
        return None
    stored = found.ours.config.get("method")
    if kind == "network":
        return dict(encoder_weights(found.ours).config)
    if stored == kind:
        return dict(found.ours.config)
    kept = {key: found.ours.config.get(key) for key in ("img_size", "in_chans", "output_stride")}
    return {"method": kind} | {key: value for key, value in kept.items() if value is not None}


def _side(found: ForeignWeights) -> int:
    """Pixels of a side, as the file tells, else 224."""
    side = found.options.get("input_size")
    fits = isinstance(side, int) and 0 < side <= LARGEST_SIDE and side % STRIDE == 0
    return side if isinstance(side, int) and fits else 224


def _classes(found: ForeignWeights, name: str) -> int:
    """Classes of the head of a file; 0 if it has none."""
    heads = head_prefixes(blank(name, num_classes=0))
    weight = next((found.state[f"{h}weight"] for h in heads if f"{h}weight" in found.state), None)
    return weight.shape[0] if weight is not None and weight.dim() in (2, 4) else 0


def _read_spark(found: ForeignWeights) -> dict[str, Any]:
    """What the tensors and the `config` of a SparK file tell of its decoder."""
    state = found.state
    told: dict[str, Any] = {"norm_pix_loss": True}  # always, in SparK
    ratio = found.options.get("mask_ratio")
    if isinstance(ratio, float) and 0.0 < ratio < 1.0:
        told["mask_ratio"] = ratio
    if "dense_decoder.dec.0.up_sample.weight" in state:
        told["decoder_width"] = shape_of(found, "dense_decoder.dec.0.up_sample.weight", 4)[0]
        norm = "ln" if "densify_norms.0.weight" in state else "none"
        told["densify_norm"] = "bn" if "densify_norms.0.running_mean" in state else norm
    return told


def _read_fcmae(found: ForeignWeights) -> dict[str, Any]:
    """What the tensors of an FCMAE file tell of its decoder."""
    if "proj.weight" not in found.state or not method_in(found):
        return {}
    return {
        "decoder_width": shape_of(found, "proj.weight", 4)[0],
        "decoder_depth": count_blocks(found.path, found.state, "decoder."),
    }
