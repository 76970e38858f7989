"""Weights of any origin as those of a model of ours, in memory: what `convmae convert` writes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from convmae.config import OptionError, WeightsError
from convmae.config.checks import as_pair
from convmae.data import IMAGENET, IMAGENET_MEAN, Statistics
from convmae.models import ConvMAE, ConvViT
from convmae.models.adapt import POSITIONS, fit_position
from convmae.models.dense_tasks.backbone import INDEX_BUFFER
from convmae.models.registry import ALIASES, create_model
from convmae.weights.architecture import (
    PATCH,
    Encoder,
    blank,
    grid_of,
    num_heads,
    read_decoder,
    read_encoder,
    shape_of,
)
from convmae.weights.checkpoint import Weights
from convmae.weights.dense_conversion import dense_weights, is_dense
from convmae.weights.foreign import ENCODER, ForeignWeights, few
from convmae.weights.network_conversion import NETWORK_KINDS, is_of_network, network_weights
from convmae.weights.networks import COUNTER, bare_name
from convmae.weights.pretrained import Grid, change, check_shapes

if TYPE_CHECKING:
    from torch import Tensor

    from convmae.config import ConvertConfig
    from convmae.data.classes import ClassNames

FRESH_SEED = 0


@dataclass
class Converted:
    """What became of a file.

    Attributes:
        found: what was in the file.
        weights: the same as weights of a model of ours.
        kind: `convmae` or `convvit`; of timm's networks `spark`, `fcmae` or `network`; `segment`
            or `detect`.
        missing: names of tensors that are not in the file: freshly initialised.
        reshaped: `name: old grid -> new grid`.
        notes: what else there is to say of the mean and deviation of its pictures.
        read: names of the file's tensors that are in the weights, where they have others there.
    """

    found: ForeignWeights
    weights: Weights
    kind: str
    missing: list[str]
    reshaped: list[str]
    notes: list[str]
    read: set[str] | None = None

    @property
    def left_out(self) -> list[str]:
        """Names of tensors of the file that the model has not."""
        if self.read is not None:
            return [key for key in self.found.state if key not in self.read]
        own = set(self.weights.state)
        if self.kind in NETWORK_KINDS:
            # The same tensor has other prefixes in a network alone and in pretraining models.
            own = {bare_name(key) for key in own} | own
            return [k for k in self.found.state if k not in own and bare_name(k) not in own]
        return [key for key in self.found.state if key not in own]


def convert_weights(config: ConvertConfig, found: ForeignWeights) -> Converted:
    """What `open_foreign` found, as weights of a model of ours; nothing is written.

    Raises:
        OptionError, WeightsError: an option cannot work, or the tensors are of no model of ours.
    """
    if is_dense(found):
        return _convert_dense(config, found)
    if is_of_network(config, found):
        return _convert_network(config, found)
    if config.format != "auto":
        raise OptionError(
            f"--format {config.format} is for timm's networks, but {found.path} is of a ConvMAE"
        )
    encoder = read_encoder(found)
    kind = _kind(config, found)
    name = _name(config, encoder, kind)
    arguments = _arguments(config, found, encoder, kind, name)
    try:
        model = blank(name, **arguments)
    except WeightsError as error:
        words = error.with_flags.removeprefix("--model: ")
        raise WeightsError(f"{found.path} is of no model that can be: {words}") from error
    old = grid_of(found, _grid(config))
    state, missing, reshaped = _fit(found, model, name, arguments, old)
    pictures, notes = _statistics(config, found, encoder.in_chans)
    reading = None if found.ours is None else found.ours.reading
    described = (pictures, _classes(found, model), reading)
    weights = Weights(found.path, name, model.config, state, *described)
    return Converted(found, weights, kind, missing, reshaped, notes)


def _convert_network(config: ConvertConfig, found: ForeignWeights) -> Converted:
    """`convert_weights` of one of timm's networks."""
    kind, name, options, state, missing = network_weights(config, found)
    pictures, notes = _statistics(config, found, options["in_chans"])
    classes = reading = None
    if found.ours is not None:
        reading = found.ours.reading
        names = found.ours.classes
        classes = names if names is not None and len(names) == options.get("num_classes") else None
    weights = Weights(found.path, name, options, state, pictures, classes, reading)
    return Converted(found, weights, kind, missing, [], notes)


def _convert_dense(config: ConvertConfig, found: ForeignWeights) -> Converted:
    """`convert_weights` of a segmenter or a detector."""
    dense = dense_weights(config, found)
    pictures, notes = _statistics(config, found, dense.config.get("in_chans", 3))
    reading = None if found.ours is None else found.ours.reading
    described = (pictures, dense.classes, reading)
    weights = Weights(found.path, dense.name, dense.config, dense.state, *described)
    others = [name for name in found.unexpected if not name.endswith(INDEX_BUFFER)]
    dropped = len(found.unexpected) - len(others)
    found = replace(found, unexpected=others)
    if dropped:
        notes.append(f"{dropped} index buffers are left out: they follow from the tables")
    missing = [name for name in dense.missing if not name.endswith(COUNTER)]
    return Converted(found, weights, dense.kind, missing, [], notes, dense.names)


def _classes(found: ForeignWeights, model: ConvMAE | ConvViT) -> ClassNames | None:
    """The names of the classes that the head of `model` has from the file."""
    names = None if found.ours is None else found.ours.classes
    if names is None or len(names) != model.config.get("num_classes"):
        return None
    return names


def _grid(config: ConvertConfig) -> tuple[int, int] | None:
    if config.input_size is None:
        return None
    height, width = as_pair(config.input_size)
    return height // PATCH, width // PATCH


def _kind(config: ConvertConfig, found: ForeignWeights) -> str:
    """What to write: `convmae` or `convvit`."""
    if config.model is not None:
        of_model = "convvit" if isinstance(blank(config.model), ConvViT) else "convmae"
        if config.kind not in ("auto", of_model):
            raise OptionError(f"--kind {config.kind} and --model {config.model!r} contradict")
        return of_model
    if config.kind != "auto":
        return config.kind
    decoder = any(key.startswith(("decoder_", "mask_token")) for key in found.state)
    return "convmae" if decoder and "head.weight" not in found.state else "convvit"


def _name(config: ConvertConfig, encoder: Encoder, kind: str) -> str:
    """The model's name; the configuration beside it says what the name alone does not."""
    if config.model is None:
        return f"{kind}_{encoder.size or 'base'}"
    usual = tuple(blank(config.model).config["embed_dim"])
    if usual != encoder.embed_dim:
        fits = f"; {kind}_{encoder.size} fits" if encoder.size else ""
        raise OptionError(
            f"--model {config.model!r} has embed_dim {usual}, but --checkpoint "
            f"{config.checkpoint!r} is of {encoder}{fits}"
        )
    return ALIASES.get(config.model, config.model)


def _arguments(
    config: ConvertConfig, found: ForeignWeights, encoder: Encoder, kind: str, name: str
) -> dict[str, Any]:
    """All arguments of the model to write."""
    grid = _grid(config) or grid_of(found)
    arguments: dict[str, Any] = {
        "img_size": (grid[0] * PATCH, grid[1] * PATCH),
        "in_chans": encoder.in_chans,
        "embed_dim": encoder.embed_dim,
        "depth": encoder.depth,
        "num_heads": num_heads(encoder, found, config.model, config.num_heads),
        "mlp_ratio": encoder.mlp_ratio,
    }
    state = found.state
    if kind == "convvit":
        has_head = "head.weight" in state
        # Without a head the encoder as it is: `norm`, and no layer that the file has not.
        pooled = "fc_norm.weight" in state or (has_head and "norm.weight" not in state)
        classes = shape_of(found, "head.weight", 2)[0] if has_head else 0
        return arguments | {"num_classes": classes, "global_pool": pooled}
    usual = blank(name).config
    stored = None if found.ours is None else found.ours.config.get("norm_pix_loss")
    stored = found.options.get("norm_pix_loss") if stored is None else stored
    given = config.norm_pix_loss
    arguments |= read_decoder(found, usual, config.decoder_num_heads)
    return arguments | {"norm_pix_loss": stored is True if given is None else given}


def _fit(
    found: ForeignWeights, model: ConvMAE | ConvViT, name: str, arguments: dict[str, Any], old: Grid
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """The state dict of `model` (which has no values); what was missing and what was reshaped."""
    state: dict[str, Tensor] = {}
    missing, reshaped = [], []
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for key in shapes:
        if key not in found.state:
            missing.append(key)
        elif key in POSITIONS and old != model.grid:
            state[key], how = _position(found, key, old, model)
            reshaped.append(f"{key}: {change(old, model.grid)} ({how})")
        else:
            state[key] = found.state[key]
    check_shapes(state, shapes, found, name)
    encoder = [key for key in missing if key.startswith(ENCODER)]
    if encoder:
        raise OptionError(
            f"--checkpoint: {found.path} lacks {few(encoder)}; an encoder of {name} needs them all"
        )
    if missing:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(FRESH_SEED)
            fresh = create_model(name, **arguments).state_dict()
        state |= {key: fresh[key] for key in missing}
    own = {key: state[key].clone(memory_format=torch.contiguous_format) for key in shapes}
    return own, missing, reshaped


def _position(
    found: ForeignWeights, key: str, old: Grid, model: ConvMAE | ConvViT
) -> tuple[Tensor, str]:
    """A position embedding for the grid of `model`, and how it was made."""
    position = found.state[key]
    patches = shape_of(found, key, 3)[1]
    if patches != old[0] * old[1]:
        raise OptionError(
            f"--checkpoint: {found.path} has {key} of {patches} patches, but pos_embed of "
            f"{old[0]} x {old[1]}"
        )
    return fit_position(position, old, model.grid, model.fixed_positions)


def _statistics(
    config: ConvertConfig, found: ForeignWeights, channels: int
) -> tuple[Statistics | None, list[str]]:
    """Mean and deviation of the pictures, None where nothing tells; and notes about them."""
    if config.mean is not None and config.std is not None:
        if len(config.mean) != channels:
            raise OptionError(
                f"--mean has {len(config.mean)} numbers, but {found.path} is of {channels} channels"
            )
        return Statistics(config.mean, config.std), []
    if found.ours is not None and found.ours.pictures is not None:
        return found.ours.pictures, []
    if channels == len(IMAGENET_MEAN):
        return (
            IMAGENET,
            ["the file tells no mean and deviation of its pictures: ImageNet's are written"],
        )
    return (
        None,
        [
            f"pictures have {channels} channels, and nothing tells their mean and deviation: give "
            "--mean and --std, or later commands will ask for them"
        ],
    )
