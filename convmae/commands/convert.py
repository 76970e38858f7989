"""`convmae convert`: weights of the official code to ours, and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from convmae.config import OptionError, for_option
from convmae.config.checks import as_pair
from convmae.config.convert import OFFICIAL_SUFFIXES, SAFETENSORS
from convmae.data import IMAGENET, IMAGENET_MEAN, Statistics
from convmae.files import replacing
from convmae.models import ConvMAE, ConvViT, resample_pos_embed
from convmae.models.layers import sincos_pos_embed
from convmae.models.registry import ALIASES, create_model
from convmae.records.folder import RunFolder
from convmae.weights.architecture import (
    PATCH,
    Encoder,
    blank,
    grid_of,
    num_heads,
    read_decoder,
    read_encoder,
    shape_of,
    sincos_grid,
)
from convmae.weights.checkpoint import STATE, WEIGHTS, save_tensors, write_weights
from convmae.weights.foreign import DECODER, ENCODER, ForeignWeights, few, open_foreign
from convmae.weights.pretrained import Grid, change, check_shapes, groups

if TYPE_CHECKING:
    from torch import Tensor

    from convmae.config import ConvertConfig

FIXED = ("pos_embed", "decoder_pos_embed")  # of a pretraining model
FRESH_SEED = 0


@dataclass
class ConversionReport:
    """What `convert` did; names of tensors.

    Attributes:
        checkpoint: the file read, and in words what it is.
        output: the file written.
        model: its name for `convmae.create_model`.
        config: its configuration.
        tensors: how many were written.
        missing: not in the file: freshly initialised.
        unexpected: in the file, but of no model of ours.
        reshaped: `name: old grid -> new grid`.
        left_out: in the file, but not in the model that was written.
        notes: anything else to know.
    """

    checkpoint: str
    output: Path
    model: str
    config: dict[str, Any]
    tensors: int
    missing: list[str]
    unexpected: list[str]
    reshaped: list[str]
    left_out: list[str]
    notes: list[str]

    def __str__(self) -> str:
        options = ", ".join(f"{key}={value}" for key, value in self.config.items())
        lines = [
            f"read {self.checkpoint}",
            f"wrote {self.output}: {self.model}, {self.tensors} tensors ({options})",
        ]
        for names, what in (
            (self.missing, "NOT IN THE FILE, freshly initialised"),
            (self.reshaped, "resampled"),
            (self.left_out, "left out"),
            (self.unexpected, "unknown, left out"),
        ):
            if names:
                lines.append(f"{what}: {groups(names)}")
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


# -- convert --------------------------------------------------------------------------------------


def convert(config: ConvertConfig) -> ConversionReport:
    """Writes the weights of `config.checkpoint` in the format that `config.output` asks for.

    Tensors that need no other shape are copied bit by bit, in their own dtype.

    Raises:
        OptionError: an option cannot work, or the file is no file of weights; nothing was written.
    """
    config.validate()
    target = _target(config)
    with for_option("checkpoint"):
        return _convert(config, target)


def _convert(config: ConvertConfig, target: Path) -> ConversionReport:
    """`convert` into a file that may be written."""
    found = open_foreign(config.checkpoint, config.key)
    encoder = read_encoder(found)
    kind = _kind(config, found)
    name = _name(config, encoder, kind)
    arguments = _arguments(config, found, encoder, kind, name)
    model = blank(name, **arguments)
    old = grid_of(found, _grid(config))
    state, missing, reshaped = _fit(found, model, name, arguments, old)
    pictures, notes = _statistics(config, found, encoder.in_chans)
    is_ours = target.suffix == SAFETENSORS
    notes = [*found.notes, *_remarks(config, found, kind, state), *(notes if is_ours else ())]
    classes, reading = (
        (None, None) if found.ours is None else (found.ours.classes, found.ours.reading)
    )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as fresh:
            if is_ours:
                write_weights(fresh, name, model.config, state, pictures, classes, reading)
            else:
                save_tensors({"model": state}, fresh)
    except OSError as error:
        raise OptionError(f"--output {config.output!r} cannot be written: {error}") from error
    return ConversionReport(
        checkpoint=f"{found.path}: {found.what}",
        output=target,
        model=name,
        config=model.config,
        tensors=len(state),
        missing=missing,
        unexpected=found.unexpected,
        reshaped=reshaped,
        left_out=[key for key in found.state if key not in state],
        notes=notes,
    )


def _target(config: ConvertConfig) -> Path:
    """The file to write."""
    output = Path(config.output).expanduser()
    if output.suffix.lower() in OFFICIAL_SUFFIXES or output.suffix == SAFETENSORS:
        target = output
        if output.is_dir():
            raise OptionError(f"--output {config.output!r} is a folder, and named like a file")
    elif output.is_dir() or not output.suffix:
        target = output / WEIGHTS
        run = [*RunFolder.of(output).traces(), *(n for n in (STATE,) if (output / n).exists())]
        if run:
            raise OptionError(
                f"--output {config.output!r} is the folder of a run (it holds {run[0]}); its "
                "weights would be hidden by others: give another"
            )
    else:
        ends = ", ".join((SAFETENSORS, *OFFICIAL_SUFFIXES))
        raise OptionError(
            f"--output must end in {ends}, or be a folder, got {config.output!r}, which is none yet"
        )
    if target.exists() and not config.overwrite:
        raise OptionError(f"--output: {target} exists; --overwrite replaces it")
    return target


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
    return arguments | {"norm_pix_loss": bool(stored) if given is None else given}


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
        elif key in FIXED and old != model.grid:
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
    if isinstance(model, ConvMAE) and sincos_grid(position) == old:
        return sincos_pos_embed(position.shape[2], model.grid).to(position.dtype), "sin-cos"
    return resample_pos_embed(position, old, model.grid), "bicubic"


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


def _remarks(
    config: ConvertConfig, found: ForeignWeights, kind: str, state: dict[str, Tensor]
) -> list[str]:
    notes = []
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in state.values()})
    if dtypes != ["float32"]:
        notes.append(f"tensors stay in {' and '.join(dtypes)}")
    bad = [key for key, value in state.items() if not bool(torch.isfinite(value).all())]
    if bad:
        notes.append(f"NaN or infinity in {few(bad)}")
    known = found.ours is not None or "norm_pix_loss" in found.options
    known = known or config.output.endswith(OFFICIAL_SUFFIXES)  # which do not say it either
    if kind == "convmae" and config.norm_pix_loss is None and not known:
        notes.append("norm_pix_loss is taken as False: the file does not tell (--norm_pix_loss)")
    if kind == "convvit" and config.kind == "auto" and "head.weight" not in found.state:
        lacking = [p for p in (*DECODER, "head.") if not any(k.startswith(p) for k in found.state)]
        names = ", ".join(f"{p}*" if p[-1] in "._" else p for p in lacking)
        notes.append(f"the file holds an encoder alone, without {names}; --finetune takes it")
    return notes


def main(config: ConvertConfig) -> int:
    """The command: `convert`, and what it says of itself; returns the exit status."""
    print(convert(config))
    return 0
