"""Weights of a model of other pictures: another size of them, another number of channels."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from convmae.config import WeightsWarning
from convmae.config.checks import ADAPT_INPUT
from convmae.models.layers import resample_pos_embed, sincos_pos_embed

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping

SINCOS_ATOL = 5e-3  # bfloat16 rounds a value below 1 by up to 2e-3
POSITIONS = ("pos_embed", "decoder_pos_embed")
# What the names of the tensors that only a pretraining model has begin with.
DECODER = ("decoder_", "mask_token", "stage1_output_decode.", "stage2_output_decode.")


# -- channels -------------------------------------------------------------------------------------


def adapt_input(weight: Tensor, in_chans: int, how: str = "auto") -> Tensor:
    """The first convolution of `C` channels for pictures of another number of channels.

    With `sum` every channel has `sum over C / in_chans`: a grey picture gives what it gave in all
    `C` channels. With `repeat` channel `i` has `weight[:, i % C] * C / in_chans`, as in timm: where
    `in_chans` is a multiple of `C`, repeated pictures give what they gave.

    Args:
        weight: `[D, C, kh, kw]`.
        in_chans: channels of the result.
        how: `"sum"`, `"repeat"`, or `"auto"`: the sum for one channel, else repeated.

    Returns:
        `[D, in_chans, kh, kw]`, in the dtype of `weight`.
    """
    channels, values = weight.shape[1], weight.float()
    if _rule(in_chans, how) == "sum":
        adapted = values.sum(dim=1, keepdim=True).expand(-1, in_chans, -1, -1) / in_chans
    else:
        adapted = values[:, _turns(channels, in_chans)] * (channels / in_chans)
    return adapted.to(weight.dtype).contiguous()


def adapt_output(values: Tensor, channels: int, in_chans: int, how: str = "auto") -> Tensor:
    """The last layer of a decoder of `C` channels for another number of channels.

    It predicts pixels, channels side by side. With `sum` every channel is predicted as the mean of
    the `C` was, with `repeat` channel `i` as channel `i % C` was.

    Args:
        values: weight `[P * C, D]` or bias `[P * C]`.
        channels: `C`.
        in_chans: channels of the result.
        how: as in `adapt_input`.

    Returns:
        `[P * in_chans, ...]`, in the dtype of `values`.
    """
    pixels = values.float().unflatten(0, (-1, channels))  # [P, C, ...]
    if _rule(in_chans, how) == "sum":
        shape = [-1, in_chans, *[-1] * (pixels.dim() - 2)]
        adapted = pixels.mean(dim=1, keepdim=True).expand(shape)
    else:
        adapted = pixels[:, _turns(channels, in_chans)]
    return adapted.flatten(0, 1).to(values.dtype).contiguous()


def adapt_channels(state: MutableMapping[str, Any], in_chans: int, how: str = "auto") -> str | None:
    """Fits the tensors of a state dict that depend on the channels of pictures, in place.

    With `fresh` they are deleted, so that a model keeps its own.

    Args:
        state: a state dict.
        in_chans: channels of the model.
        how: one of `ADAPT_INPUT`.

    Returns:
        What was done, in words; None where the channels are the same.

    Raises:
        ValueError: `how` is none of these.
    """
    rule = _rule(in_chans, how)
    first, last = "patch_embed1.proj", "decoder_pred"
    weight = state.get(f"{first}.weight")
    if not isinstance(weight, Tensor) or weight.dim() != 4 or weight.shape[1] in (0, in_chans):
        return None
    channels = weight.shape[1]
    names = [n for n in (f"{last}.weight", f"{last}.bias") if isinstance(state.get(n), Tensor)]
    if rule == "fresh":
        for name in (f"{first}.weight", f"{first}.bias", *names):
            state.pop(name, None)
    else:
        state[f"{first}.weight"] = adapt_input(weight, in_chans, how)
        for name in names:
            if state[name].shape[0] % channels == 0:
                state[name] = adapt_output(state[name], channels, in_chans, how)
    also = " (decoder_pred likewise)" if names else ""
    return f"patch_embed1: {_in_words(channels, in_chans, rule)}{also}"


def adapt_network(
    state: MutableMapping[str, Any], own: Mapping[str, Tensor], channels: int, how: str = "auto"
) -> str | None:
    """`adapt_channels` for one of timm's networks, whose first convolutions have any names.

    They are those whose kernels in `state` and in the model differ in their input channels, and the
    last layer of a decoder is what differs in its outputs.

    Args:
        state: a state dict; of names that the model has not, nothing is done.
        own: the state dict of the model.
        channels: of the pictures that `state` is of.
        how: one of `ADAPT_INPUT`.

    Returns:
        What was done, in words; None where nothing depends on it.

    Raises:
        ValueError: `how` is none of these.
    """
    shapes = {
        name: (list(value.shape), list(own[name].shape))
        for name, value in state.items()
        if name in own and value.shape != own[name].shape and 0 not in value.shape
    }
    first = [name for name, (old, new) in shapes.items() if _differs(old, new, axis=1, rank=4)]
    first = [name for name in first if shapes[name][0][1] == channels]
    in_chans = shapes[first[0]][1][1] if first else channels
    rule = _rule(in_chans, how)
    if not first:
        return None
    last = [
        name
        for name, (old, new) in shapes.items()
        if _differs(old, new, axis=0) and old[0] * in_chans == new[0] * channels
    ]
    for name in (*first, *last):
        if rule == "fresh":
            del state[name]
        elif name in first:
            state[name] = adapt_input(state[name], in_chans, how)
        else:
            state[name] = adapt_output(state[name], channels, in_chans, how)
    also = f" ({', '.join(last)} likewise)" if last else ""
    return f"{', '.join(first)}: {_in_words(channels, in_chans, rule)}{also}"


def _differs(old: list[int], new: list[int], axis: int, rank: int | None = None) -> bool:
    """Whether two shapes are the same but along one axis, and have `rank` axes if that is given."""
    if len(old) != len(new) or rank not in (None, len(old)):
        return False
    return old[:axis] + old[axis + 1 :] == new[:axis] + new[axis + 1 :]


def _in_words(channels: int, in_chans: int, rule: str) -> str:
    words = {
        "sum": f"every channel has their sum / {in_chans}" if in_chans > 1 else "their sum",
        "repeat": f"repeated, times {channels} / {in_chans}",
        "fresh": "fresh",
    }
    return f"{channels} -> {in_chans} channels, {words[rule]}"


def _rule(in_chans: int, how: str) -> str:
    """What `auto` stands for; any other as it is."""
    if how not in ADAPT_INPUT:
        raise ValueError(f"adapt_input must be one of {', '.join(ADAPT_INPUT)}, got {how!r}")
    if how == "auto":
        return "sum" if in_chans == 1 else "repeat"
    return how


def _turns(channels: int, in_chans: int) -> Tensor:
    return torch.arange(in_chans) % channels


# -- sizes ----------------------------------------------------------------------------------------


def factors(patches: int) -> list[tuple[int, int]]:
    """All grids of so many patches."""
    low = [h for h in range(1, math.isqrt(patches) + 1) if patches % h == 0]
    rows = [*low, *(patches // h for h in reversed(low) if h * h != patches)]
    return [(h, patches // h) for h in rows]


def sincos_grid(pos_embed: Tensor) -> tuple[int, int] | None:
    """The grid whose fixed sin-cos embedding this is; None if it is none.

    Args:
        pos_embed: `[1, L, D]`.
    """
    if pos_embed.dim() != 3 or pos_embed.shape[2] % 4 or 0 in pos_embed.shape:
        return None
    patches, width = pos_embed.shape[1:]
    second_row = sincos_pos_embed(width, (2, 1))[:, 1:]  # its first patch tells the columns
    alike = (pos_embed.float().cpu() - second_row).abs().amax(2)[0] <= SINCOS_ATOL
    columns = int(alike.nonzero()[0]) if bool(alike.any()) else patches
    if columns == 0 or patches % columns:
        return None
    grid = patches // columns, columns
    fixed = sincos_pos_embed(width, grid)
    close = torch.allclose(pos_embed.float().cpu(), fixed, rtol=0.0, atol=SINCOS_ATOL)
    return grid if close else None


def fit_position(
    pos_embed: Tensor,
    old: tuple[int, int],
    new: tuple[int, int],
    fixed: bool,
    antialias: bool = True,
) -> tuple[Tensor, str]:
    """A position embedding for another grid, and how it was made: `sin-cos` or `bicubic`.

    Args:
        pos_embed: `[1, L, D]` of the old grid.
        old: `(gh, gw)` patches of it.
        new: `(gh, gw)` patches of the result.
        fixed: whether the model's embedding is sin-cos and frozen: one that is such is then
            computed anew instead of resampled.
        antialias: as in `resample_pos_embed`.
    """
    if fixed and sincos_grid(pos_embed) == tuple(old):
        return sincos_pos_embed(pos_embed.shape[2], new).to(pos_embed), "sin-cos"
    return resample_pos_embed(pos_embed, old, new, antialias), "bicubic"


def fit_positions(
    model: nn.Module, state: MutableMapping[str, Any], prefix: str, errors: list[str]
) -> None:
    """Fits the position embeddings of a state dict to the grid of `model`, in place, and says so.

    The old grid is that of the sin-cos embedding, if it is one, else a square.

    Args:
        model: a model with `position_grid`, `fixed_positions` and `antialiased_positions`.
        state: a state dict.
        prefix: what its names begin with.
        errors: gets a line where the old grid cannot be known.
    """
    new: tuple[int, int] = model.position_grid  # type: ignore[assignment]
    rules: tuple[bool, bool] = (model.fixed_positions, model.antialiased_positions)  # type: ignore[assignment]
    for name in POSITIONS:
        value: Any = state.get(prefix + name)
        own: Any = getattr(model, name, None)
        if not _plain(value) or not _plain(own) or value.dim() != 3:
            continue
        patches, width = value.shape[1:]
        if value.shape[0] != 1 or width != own.shape[2] or (value.is_meta and own.is_meta):
            continue
        old = None if value.is_meta else sincos_grid(value)
        if patches == new[0] * new[1] and old in (None, new):
            continue
        side = math.isqrt(patches)
        if old is None and side * side == patches:
            old = side, side
        if old is None:
            errors.append(
                f"{prefix}{name} is of {patches} patches, no square, and the model of {new[0]} x "
                f"{new[1]}: from which it was is not known here. convmae.load_model(path, "
                "img_size=...) and convmae.load_pretrained(model, path) know it of files that "
                "convmae wrote"
            )
            continue
        state[prefix + name], how = fit_position(value, old, new, *rules)
        warnings.warn(
            f"{prefix}{name} is of pictures of another size: resampled ({how}), {old[0]} x "
            f"{old[1]} -> {new[0]} x {new[1]} patches",
            WeightsWarning,
            stacklevel=2,
        )


def _plain(value: Any) -> bool:
    """Whether it is a tensor of its own, not one that is spread over processes."""
    return type(value) in (Tensor, nn.Parameter)
