"""Weights of any origin into a classifier, for `--finetune`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from convmae.config import WeightsError
from convmae.data.classes import ClassNumbers, listed, normal_form
from convmae.models import resample_pos_embed
from convmae.weights.architecture import grid_of, read_encoder
from convmae.weights.foreign import ForeignWeights, few

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from convmae.models.trunk import Trunk

Grid: TypeAlias = "tuple[int, int]"
LINEAR_OF_HEAD = ("head.weight", "head.bias", "head.1.weight", "head.1.bias")  # a row a class


@dataclass
class LoadReport:
    """What `load_pretrained` did; names of tensors.

    Attributes:
        missing: not in the file: they keep the values that the model had.
        unexpected: in the file, but of no model of ours.
        resampled: `name: old grid -> new grid`.
        left_out: in the file, but not in this model, such as the decoder.
        loaded: how many were read.
        path: the file.
        head: what became of the head of a classifier, in words.
        keeps_head: whether the model has the head of the file.
    """

    missing: list[str]
    unexpected: list[str]
    resampled: list[str]
    left_out: list[str] = field(default_factory=list)
    loaded: int = 0
    path: Path = Path()
    head: str = ""
    keeps_head: bool = False

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


def load_pretrained(
    model: Trunk, weights: ForeignWeights, classes: Sequence[str] | None = None
) -> LoadReport:
    """Puts the encoder of a file into `model`, in place; a classifier's head too, if it fits.

    With `classes` it fits if the file names all of them, in any order: each gets its own row.
    Otherwise it fits if it is of the same shape.

    The position embedding is resampled to the model's grid. Only `head` and `fc_norm` may keep the
    values that they have.

    Args:
        model: a `ConvViT`, of any `img_size`.
        weights: what `open_foreign` weights.
        classes: names of the model's classes.

    Raises:
        WeightsError: the file does not fit the model.
    """
    encoder = read_encoder(weights)
    own = model.state_dict()
    shapes = {key: tuple(value.shape) for key, value in own.items()}
    if encoder.in_chans != model.in_chans:
        raise WeightsError(
            f"{weights.path} is of pictures of {encoder.in_chans} channels, but the data "
            f"and the model have {model.in_chans} (in_chans)"
        )
    state = {key: value for key, value in weights.state.items() if key in own}
    resampled = []
    old = grid_of(weights)
    if old != model.grid and "pos_embed" in state:
        state["pos_embed"] = resample_pos_embed(state["pos_embed"], old, model.grid)
        resampled.append(f"pos_embed: {change(old, model.grid)}")
    rows, told = None, ""
    if classes is not None and any(key.startswith("head.") for key in weights.state):
        rows, told = _rows_by_name(weights, classes)
        state = _with_head(state, rows)
    if any(tuple(state[key].shape) != shapes[key] for key in state if key.startswith("head.")):
        state = _with_head(state, None)  # of other classes
    kept = rows is not None and all(key in state for key in own if key.startswith("head."))
    if rows is not None and not kept:
        state, told = _with_head(state, None), "head: fresh, as that of the file is of another kind"
    fits = f" ({encoder}; convvit_{encoder.size} fits)" if encoder.size else f" ({encoder})"
    check_shapes(state, shapes, weights, "the model", fits)
    missing = [key for key in own if key not in state]
    needed = [key for key in missing if not key.startswith(("head.", "fc_norm."))]
    if needed:
        raise WeightsError(f"{weights.path} lacks {few(needed)}, which the model needs{fits}")
    model.load_state_dict(own | state)
    return LoadReport(
        missing=missing,
        unexpected=weights.unexpected,
        resampled=resampled,
        left_out=[key for key in weights.state if key not in state],
        loaded=len(state),
        path=weights.path,
        head=told,
        keeps_head=kept,
    )


def _rows_by_name(weights: ForeignWeights, classes: Sequence[str]) -> tuple[list[int] | None, str]:
    """The row of each class in the head of a file, None if it lacks one; and that in words."""
    names = None if weights.ours is None else weights.ours.classes
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


def _with_head(state: dict[str, Tensor], rows: list[int] | None) -> dict[str, Tensor]:
    """`state` with these rows of its head, or without a head."""
    if rows is None:
        return {key: value for key, value in state.items() if not key.startswith("head.")}
    of_classes = [key for key in LINEAR_OF_HEAD if key in state]
    if any(max(rows) >= len(state[key]) for key in of_classes):  # names of another head
        return _with_head(state, None)
    return state | {key: state[key][rows] for key in of_classes}


def classifier_for(weights: ForeignWeights) -> str | None:
    """The classifier of the size of an encoder, such as `convvit_base`; None if of no known size.

    Raises:
        WeightsError: the tensors are not those of ConvMAE's encoder.
    """
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
