"""Weights of any origin into a model, for `--finetune` and `--init`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from convmae.config import WeightsError
from convmae.data.classes import ClassNumbers, listed, normal_form
from convmae.models import ConvViT
from convmae.models.adapt import DECODER, POSITIONS, adapt_channels, fit_position
from convmae.models.cnn.names import is_timm_name
from convmae.models.trunk import Trunk
from convmae.weights.architecture import Encoder, grid_of, read_encoder
from convmae.weights.foreign import ForeignWeights, few, open_foreign
from convmae.weights.network_name import holds_network, network_name, told_name
from convmae.weights.networks import (
    head_prefixes,
    network_in,
    network_prefix,
    network_state,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from convmae.data import Statistics

Grid: TypeAlias = "tuple[int, int]"
LINEAR_OF_HEAD = ("weight", "bias", "1.weight", "1.bias")  # of a classifier: a row a class


@dataclass
class LoadReport:
    """What `load_pretrained` did; names of tensors.

    Attributes:
        missing: not in the file, or not of this model's shape: they keep the values that the model
            had.
        unexpected: in the file, but of no model of ours.
        resampled: `name: old grid -> new grid`.
        left_out: in the file, but not in this model, such as the decoder.
        loaded: how many were read.
        path: the file.
        head: what became of the head of a classifier, in words.
        keeps_head: whether the model has the head of the file.
        adapted: how the first convolution was fitted to the channels; None if it did not need it.
        notes: anything else to know.
        statistics: mean and deviation that the file tells; None if it tells none, or of pictures
            of other channels.
    """

    missing: list[str]
    unexpected: list[str]
    resampled: list[str]
    left_out: list[str] = field(default_factory=list)
    loaded: int = 0
    path: Path = Path()
    head: str = ""
    keeps_head: bool = False
    adapted: str | None = None
    notes: list[str] = field(default_factory=list)
    statistics: Statistics | None = None

    def __str__(self) -> str:
        parts = [f"{self.loaded} tensors from {self.path}"]
        for names, what in (
            (self.missing, "not in it, so fresh"),
            (self.resampled, "resampled"),
            (self.left_out, "left out"),
            (self.unexpected, "unknown, so left out"),
        ):
            if names:
                parts.append(f"{what}: {groups(names)}")
        if self.head:
            parts.append(self.head)
        return "; ".join(parts)

    def lines(self) -> list[str]:
        """All that there is to tell, a line each."""
        adapted = [] if self.adapted is None else [f"note: {self.path}: {self.adapted}"]
        return [str(self), *adapted, *(f"note: {note}" for note in self.notes)]


def load_pretrained(
    model: nn.Module,
    weights: ForeignWeights | str | Path,
    adapt_input: str = "auto",
    classes: Sequence[str] | None = None,
) -> LoadReport:
    """Puts weights of any origin into `model`, in place: the whole encoder, and what else fits.

    Position embeddings are fitted to the model's grid, the first convolution to its channels. A
    classifier takes a head of the same classes; a pretraining model the decoder, if it is of the
    same width and depth. The rest keeps the values that it has.

    Args:
        model: a `ConvViT`, `ConvMAE` or `FastConvMAE`, of any `img_size` and `in_chans`; or what
            `create_model` makes of one of timm's networks, whose weights must be of that network.
        weights: a run's folder, a `.safetensors` or PyTorch file, or what `open_foreign` found.
        adapt_input: for other channels: `"sum"`, `"repeat"`, `"fresh"` or `"auto"`, as in
            `convmae.load_model`.
        classes: names of the model's classes. The head of a classifier then fits if the file names
            all of them, in any order: each gets its own row. Without them it fits if it is of the
            same shape.

    Returns:
        What was loaded, what stayed fresh, what was left out; `print` it.

    Raises:
        WeightsError: there is no such file, or the model's encoder is not in it. The model is
            unchanged.
        ValueError: `adapt_input` is none of these.
    """
    found = weights if isinstance(weights, ForeignWeights) else open_foreign(weights)
    if not isinstance(model, Trunk):
        return _load_network(model, found, adapt_input, classes)
    if found.ours is not None and is_timm_name(found.ours.model):
        raise WeightsError(
            f"{found.path} is of {found.ours.model}, but the model is a {type(model).__name__}; "
            f"give weights of such a model, or --model {found.ours.model}"
        )
    if found.ours is None and holds_network(found):
        raise WeightsError(
            f"{found.path} seems to be of a convolutional network ({network_in(found)}), but the "
            f"model is a {type(model).__name__}; give weights of such a model, or --model "
            f"{told_name(found) or 'timm:NAME'}"
        )
    encoder = read_encoder(found)
    own = model.state_dict()
    state = {key: value for key, value in found.state.items() if key in own}
    resampled = _fit_positions(model, found, state)
    adapted = adapt_channels(state, model.in_chans, adapt_input)
    head, keeps_head = "", False
    if classes is not None and any(key.startswith("head.") for key in found.state):
        state, head = _head_by_name(found, state, own, classes)
        keeps_head = any(key.startswith("head.") for key in state)
    may_lack, notes = _choose(model, found, state, own)
    if adapted and adapt_input == "fresh":
        may_lack = (*may_lack, "patch_embed1.proj.")
    fits = f" ({_fitting(model, encoder)})"
    check_shapes(state, {key: tuple(v.shape) for key, v in own.items()}, found, "the model", fits)
    missing = [key for key in own if key not in state]
    needed = [key for key in missing if not key.startswith(may_lack)]
    if needed:
        raise WeightsError(f"{found.path} lacks {few(needed)}, which the model needs{fits}")
    report = put_tensors(model, found, state, head, keeps_head)
    report.resampled, report.notes = resampled, notes
    note_adapted(report, found, adapted, encoder.in_chans)
    return report


def _load_network(
    model: Any, found: ForeignWeights, adapt_input: str, classes: Sequence[str] | None
) -> LoadReport:
    """`load_pretrained` of one of timm's networks."""
    read = network_state(model, found, adapt_input)
    own, network, state = model.state_dict(), network_prefix(model), read.state
    heads = tuple(network + head for head in head_prefixes(model))
    head, notes = "", list(found.notes)
    if classes is not None and any(key.startswith(heads) for key in state):
        state, head = _head_by_name(found, state, own, classes, model.head_prefix)
    else:
        _drop_other(state, own, heads)
    state = {key: value for key, value in state.items() if key in own}
    decoder = [key for key in own if not key.startswith(network)]
    whole = all(k in state and state[k].shape == own[k].shape for k in decoder)
    there = any(key in state or key in read.others for key in decoder)
    if not whole and not read.adapted and there:
        notes.append(f"the decoder of {found.path} is not whole, or not of the model's size: fresh")
        state = {key: value for key, value in state.items() if key not in decoder}
    check_shapes(state, {key: tuple(v.shape) for key, v in own.items()}, found, "the model")
    report = put_tensors(model, found, state, head, any(key.startswith(heads) for key in state))
    report.notes = notes
    report.left_out = read.others + [read.names[key] for key in read.names if key not in state]
    if found.ours is not None:  # all its tensors are known
        report.unexpected = []
    note_adapted(report, found, read.adapted, read.channels)
    return report


def put_tensors(
    model: nn.Module, found: ForeignWeights, state: dict[str, Tensor], head: str, keeps_head: bool
) -> LoadReport:
    """Gives a model the tensors that fit it; the rest keeps what it has.

    Raises:
        WeightsError: a value is not finite.
    """
    own = model.state_dict()
    bad = [key for key, value in state.items() if not bool(torch.isfinite(value).all())]
    if bad:
        raise WeightsError(f"{found.path} holds NaN or infinity in {few(bad)}; nothing was loaded")
    model.load_state_dict(own | state)
    return LoadReport(
        missing=[key for key in own if key not in state],
        unexpected=found.unexpected,
        resampled=[],
        left_out=[key for key in found.state if key not in state],
        loaded=len(state),
        path=found.path,
        head=head,
        keeps_head=keeps_head,
    )


def note_adapted(
    report: LoadReport, found: ForeignWeights, adapted: str | None, channels: int | None
) -> None:
    """Says how channels were fitted; statistics of other channels are of no use then."""
    report.adapted = adapted
    report.statistics = None if found.ours is None else found.ours.pictures
    if adapted and report.statistics is not None:
        report.notes.append(
            f"mean and deviation of {found.path} are of {channels} channels: not used"
        )
        report.statistics = None


def _head_by_name(
    found: ForeignWeights,
    state: dict[str, Tensor],
    own: dict[str, Tensor],
    classes: Sequence[str],
    prefix: str = "head.",
) -> tuple[dict[str, Tensor], str]:
    """`state` with the file's row of each class, or without a head; and that in words."""
    rows, told = _rows_by_name(found, classes)
    state = _with_head(state, rows, prefix)
    names = {key for key in own if key.startswith(prefix)}
    fits = all(key in state and state[key].shape == own[key].shape for key in names)
    if rows is not None and not fits:
        return _with_head(
            state, None, prefix
        ), "head: fresh, as that of the file is of another kind"
    return state, told


def _rows_by_name(found: ForeignWeights, classes: Sequence[str]) -> tuple[list[int] | None, str]:
    """The row of each class in the head of a file, None if it lacks one; and that in words."""
    names = None if found.ours is None else found.ours.classes
    if names is None:
        return None, "head: fresh, as the file does not tell the names of its classes"
    numbered = isinstance(names, ClassNumbers), isinstance(classes, ClassNumbers)
    if numbered[0] != numbered[1] and tuple(names) != tuple(classes):
        return None, "head: fresh, as one of file and data has numbers in place of class names"
    place = {normal_form(name): number for number, name in enumerate(names)}
    unknown = [name for name in classes if normal_form(name) not in place]
    if unknown:
        return None, (
            f"head: fresh, as {len(unknown)} of the {len(classes)} classes are none of the "
            f"{len(names)} of the file: {listed(unknown)}"
        )
    return [place[normal_form(name)] for name in classes], (
        f"head: that of the file, by the names of {len(classes)} of its {len(names)} classes"
    )


def _with_head(state: dict[str, Tensor], rows: list[int] | None, prefix: str) -> dict[str, Tensor]:
    """`state` with these rows of its head, or without a head."""
    if rows is None:
        return {key: value for key, value in state.items() if not key.startswith(prefix)}
    of_classes = [prefix + name for name in LINEAR_OF_HEAD if prefix + name in state]
    if any(max(rows) >= len(state[key]) for key in of_classes):  # names of another head
        return _with_head(state, None, prefix)
    return state | {key: state[key][rows] for key in of_classes}


def _choose(
    model: Trunk, found: ForeignWeights, state: dict[str, Tensor], own: dict[str, Tensor]
) -> tuple[tuple[str, ...], list[str]]:
    """Takes out of `state` what is behind the encoder and does not fit the model as a whole.

    Returns:
        What the names begin with that the model may keep, and what there is to tell.
    """
    notes = list(found.notes)
    if isinstance(model, ConvViT):
        _drop_other(state, own, ("head.",))  # of other classes
        return ("head.", "fc_norm."), notes
    for name in ("norm.", *DECODER[2:]):
        _drop_other(state, own, (name,))
    if _drop_other(state, own, DECODER[:2]):
        notes.append(f"the decoder of {found.path} is not whole, or not of the model's size: fresh")
    elif "mask_token" in state:
        notes += _other_target(model, found)
    return (*DECODER, "norm."), notes


def _fitting(model: Trunk, encoder: Encoder) -> str:
    """What an encoder is of, and the model that it fits, if there is one."""
    kind = "convvit" if isinstance(model, ConvViT) else "convmae"
    return f"{encoder}; {kind}_{encoder.size} fits" if encoder.size else str(encoder)


def _fit_positions(model: Trunk, found: ForeignWeights, state: dict[str, Tensor]) -> list[str]:
    """Fits position embeddings to the grid of `model`, in `state`; what was done, in words."""
    old, done = grid_of(found), []
    for name in POSITIONS:
        if name not in state or old == model.grid:
            continue
        if state[name].shape[:2] != (1, old[0] * old[1]):
            raise WeightsError(
                f"{found.path} has {name} of shape {list(state[name].shape)}, but pictures of "
                f"{old[0]} x {old[1]} patches"
            )
        state[name], _ = fit_position(state[name], old, model.grid, model.fixed_positions)
        done.append(f"{name}: {change(old, model.grid)}")
    return done


def _drop_other(
    state: dict[str, Tensor], own: dict[str, Tensor], prefixes: tuple[str, ...]
) -> bool:
    """Takes tensors of these names out of `state` unless they are all there, of the same shapes.

    Returns:
        Whether any was taken out.
    """
    names = {key for key in own if key.startswith(prefixes)}
    there = {key for key in state if key.startswith(prefixes)}
    if names == there and all(state[key].shape == own[key].shape for key in names):
        return False
    for key in there:
        del state[key]
    return bool(there)


def _other_target(model: Trunk, found: ForeignWeights) -> list[str]:
    """What to tell where a decoder learned to predict other pixels than the model's is to."""
    told = found.options if found.ours is None else found.ours.config
    before, now = told.get("norm_pix_loss"), getattr(model, "norm_pix_loss", None)
    if not isinstance(before, bool) or before == now:
        return []
    return [f"the decoder of {found.path} was trained with norm_pix_loss {before}, not {now}"]


def classifier_for(weights: ForeignWeights) -> str | None:
    """The classifier of the size of an encoder, such as `convvit_base`; None if of no known size.

    Of one of timm's networks it is the name that the file has or its shapes tell.

    Raises:
        WeightsError: the tensors are those of a network that nothing names, or neither of a
            network nor of ConvMAE's encoder.
    """
    if weights.ours is not None and is_timm_name(weights.ours.model):
        return weights.ours.model
    if weights.ours is None and holds_network(weights):
        return network_name(weights)
    size = read_encoder(weights).size
    return None if size is None else f"convvit_{size}"


def change(old: Grid, new: Grid) -> str:
    """In words, from which grid to which."""
    return f"{old[0]} x {old[1]} -> {new[0]} x {new[1]} patches"


def groups(names: list[str]) -> str:
    """`decoder_blocks (96), head.bias`: the names, those of one module together."""
    modules: dict[str, list[str]] = {}
    for name in names:
        module = name.partition(".")[0] if ": " not in name else name
        modules.setdefault(module, []).append(name)
    return ", ".join(g[0] if len(g) == 1 else f"{m} ({len(g)} tensors)" for m, g in modules.items())


def check_shapes(
    state: dict[str, Tensor],
    shapes: dict[str, tuple[int, ...]],
    found: ForeignWeights,
    name: str,
    fits: str = "",
) -> None:
    """Raises `WeightsError` at the first tensor of another shape than the model's."""
    for key, value in state.items():
        if tuple(value.shape) != shapes[key]:
            raise WeightsError(
                f"{found.path} has {key} of shape {list(value.shape)}, but {name} takes "
                f"{list(shapes[key])}{fits}"
            )
