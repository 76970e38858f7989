"""Which model a state dict is of, from the names and shapes of its tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from convmae.config import WeightsError
from convmae.models.adapt import factors, sincos_grid
from convmae.models.registry import DECODER as USUAL_DECODER
from convmae.models.registry import SIZES, TINY_DECODER, create_model
from convmae.weights.configuration import count_blocks
from convmae.weights.foreign import few

if TYPE_CHECKING:
    from convmae.weights.foreign import ForeignWeights

PATCH = 16
DECODER_HEADS = {
    d["decoder_embed_dim"]: d["decoder_num_heads"] for d in (USUAL_DECODER, TINY_DECODER)
}


@dataclass
class Encoder:
    """What the shapes of an encoder tell; `mlp_ratio` has whole numbers where they are whole."""

    in_chans: int
    embed_dim: tuple[int, int, int]
    depth: tuple[int, int, int]
    mlp_ratio: tuple[float, float, float]

    @property
    def size(self) -> str | None:
        """`tiny`, `small`, `base` ... if it has the widths and depths of one of them."""
        for name, config in SIZES.items():
            if (tuple(config["embed_dim"]), tuple(config["depth"])) == (self.embed_dim, self.depth):
                return name
        return None

    def __str__(self) -> str:
        return f"embed_dim {self.embed_dim}, depth {self.depth}"


def read_encoder(found: ForeignWeights) -> Encoder:
    """The sizes of an encoder.

    Raises:
        WeightsError: the tensors are not those of ConvMAE's encoder.
    """
    shapes = [shape_of(found, f"patch_embed{i}.proj.weight", 4) for i in (1, 2, 3)]
    kernels = [shape[2:] for shape in shapes]
    if kernels != [(4, 4), (2, 2), (2, 2)]:
        raise WeightsError(
            f"{found.path}: the patch embeddings have kernels {kernels}, expected "
            "4 x 4, 2 x 2 and 2 x 2 (patches of 16 x 16 pixels)"
        )
    dims = tuple(shape[0] for shape in shapes)
    depth = tuple(count_blocks(found.path, found.state, f"blocks{i}.") for i in (1, 2, 3))
    hidden = [shape_of(found, f"blocks{i}.0.mlp.fc1.weight", 0)[0] for i in (1, 2, 3)]
    ratios = tuple(_ratio(n, d) for n, d in zip(hidden, dims))
    return Encoder(shapes[0][1], dims, depth, ratios)  # type: ignore[arg-type]


def _ratio(hidden: int, dim: int) -> float:
    """The `mlp_ratio` with `int(dim * mlp_ratio) == hidden`."""
    if hidden % dim == 0:
        return hidden // dim
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def shape_of(found: ForeignWeights, name: str, rank: int) -> tuple[int, ...]:
    """The shape of a tensor that must be there, with `rank` dimensions (0: any but none)."""
    if name not in found.state:
        names = [*found.state, *found.unexpected]
        raise WeightsError(
            f"{found.path} is not of a ConvMAE: it has no {name}; it holds "
            f"{few(names) or 'no tensors'}"
        )
    shape = tuple(found.state[name].shape)
    if (rank and len(shape) != rank) or not shape or 0 in shape:
        raise WeightsError(
            f"{found.path}: {name} has shape {list(shape)}, expected {rank or 'some'} dimensions"
        )
    return shape


def num_heads(encoder: Encoder, found: ForeignWeights, model: str | None, heads: int | None) -> int:
    """Attention heads, which no shape tells.

    Args:
        encoder: of the file.
        found: the file.
        model: the name of a model that is like it, if given.
        heads: as given, if they are.

    Raises:
        WeightsError: neither the file, nor its size, nor an option tells.
    """
    if heads is not None:
        return heads
    if found.ours is not None and "num_heads" in found.ours.config:
        return found.ours.config["num_heads"]
    if model is not None:
        return blank(model).config["num_heads"]
    if encoder.size is None:
        known = ", ".join(SIZES)
        raise WeightsError(
            f"--num_heads is needed (or --model): no shape tells it, and {found.path} is of "
            f"{encoder}, none of the known sizes ({known})"
        )
    return SIZES[encoder.size]["num_heads"]


def read_decoder(found: ForeignWeights, usual: dict[str, Any], heads: int | None) -> dict[str, int]:
    """`decoder_embed_dim`, `decoder_depth` and `decoder_num_heads`.

    Args:
        found: the file.
        usual: a configuration to take them from where the file has no decoder.
        heads: `--decoder_num_heads`.

    Raises:
        WeightsError: the file has a decoder whose heads nothing tells.
    """
    state = found.state
    width = usual["decoder_embed_dim"]
    for name, axis in (("decoder_embed.weight", 0), ("mask_token", -1), ("decoder_norm.weight", 0)):
        if name in state and state[name].dim():
            width = state[name].shape[axis]
            break
    depth = count_blocks(found.path, state, "decoder_blocks.") or usual["decoder_depth"]
    if heads is None and found.ours is not None:
        heads = found.ours.config.get("decoder_num_heads")
    if heads is None:
        heads = DECODER_HEADS.get(width)
    if heads is None:
        raise WeightsError(
            f"--decoder_num_heads is needed: no shape tells it, and {found.path} has a decoder of "
            f"the unusual width {width}"
        )
    return {"decoder_embed_dim": width, "decoder_depth": depth, "decoder_num_heads": heads}


def blank(name: str, **overrides: Any) -> Any:
    """A model without values, to ask it for its shapes.

    Raises:
        WeightsError: there is no such model.
    """
    try:
        with torch.device("meta"):
            return create_model(name, **overrides)
    except (ValueError, TypeError) as error:
        raise WeightsError(f"--model: {error}") from error


# -- position embeddings --------------------------------------------------------------------------


def grid_of(found: ForeignWeights, given: tuple[int, int] | None = None) -> tuple[int, int]:
    """`(gh, gw)`: the patches of a column and a row of the pictures that a file was trained on.

    It is what the file says, if convmae wrote it; else the grid whose sin-cos embedding the file
    holds (a pretraining model's); else `given`, if it has as many patches; else a square.

    Args:
        found: the file.
        given: the grid, as an option tells it.

    Raises:
        WeightsError: there is no position embedding, or its grid is none of those.
    """
    patches = shape_of(found, "pos_embed", 3)[1]
    if found.ours is not None:
        height, width = found.ours.config.get("img_size", (0, 0))
        grid = (height // PATCH, width // PATCH)
        if grid[0] * grid[1] == patches:
            return grid
    fixed = sincos_grid(found.state["pos_embed"])
    if fixed is not None:
        return fixed
    if given is not None and given[0] * given[1] == patches:
        return given
    side = math.isqrt(patches)
    if side * side == patches:
        return side, side
    sizes = [f"{PATCH * h} x {PATCH * w}" for h, w in factors(patches)]
    raise WeightsError(
        f"{found.path} has a position embedding of {patches} patches, no square; "
        "convmae convert --input_size takes the height and width of the pictures it was trained "
        f"on, one of {few(sizes, 12)}"
    )
