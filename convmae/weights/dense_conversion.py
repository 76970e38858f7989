"""Official files of segmenters and detectors as weights of ours, in memory, and back.

Segmentation: `{meta, state_dict, optimizer}`, whose names are those here. Detection: `{model, ...}`
in two configurations, with the names of `convmae.models.dense_tasks.official_names`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from convmae.config import OptionError, WeightsError
from convmae.config.checks import as_pair
from convmae.data.classes import ClassNames, ClassNumbers
from convmae.models.cnn.names import is_timm_name
from convmae.models.dense_tasks.backbone import INDEX_BUFFER
from convmae.models.dense_tasks.official_names import BACKBONES, official_names, own_names
from convmae.models.dense_tasks.positions import relative_position_index, square_grid
from convmae.models.sizes import SIZES
from convmae.models.task_names import DETECT, SEGMENT, split_task
from convmae.weights.architecture import PATCH, Encoder, blank, grid_of, read_encoder, shape_of
from convmae.weights.dense_names import FIRST, TABLE, trunk_of
from convmae.weights.foreign import ForeignWeights, few
from convmae.weights.networks import COUNTER
from convmae.weights.pretrained import check_shapes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from convmae.config import ConvertConfig
    from convmae.weights.checkpoint import Weights

DENSE_KINDS = ("segment", "detect")
# What the names of a trunk begin with in official files, by the kind of the backbone.
TRUNKS = {
    "detection": BACKBONES["detection"],
    "vitdet": f"{BACKBONES['vitdet']}net.",
    "segmentation": "backbone.",
}
RPN, BOX, MASK = "proposal_generator.rpn_head.", "roi_heads.box_head.", "roi_heads.mask_head."


@dataclass
class DenseWeights:
    """A segmenter or detector that was read.

    Attributes:
        kind: one of `DENSE_KINDS`.
        name: for `convmae.create_model`.
        config: of the model.
        state: its state dict.
        names: of the file's tensors that are in it.
        missing: names of `state` that are not in the file: counters of batches.
        classes: names of the classes that the file tells.
    """

    kind: str
    name: str
    config: dict[str, Any]
    state: dict[str, Tensor]
    names: set[str]
    missing: list[str]
    classes: ClassNames | None


def kind_of_backbone(found: ForeignWeights) -> str | None:
    """The kind of backbone of an official segmenter or detector; None of other files."""
    for kind, prefix in TRUNKS.items():
        if prefix + FIRST in found.state:
            return kind
    return None


def is_dense(found: ForeignWeights) -> bool:
    """Whether a file is of a segmenter or a detector."""
    if found.ours is not None:
        return bool(split_task(found.ours.model)[0])
    return kind_of_backbone(found) is not None


def dense_weights(config: ConvertConfig, found: ForeignWeights) -> DenseWeights:
    """What to write of a file of a segmenter or detector.

    Raises:
        OptionError, WeightsError: an option does not fit the file, or a tensor no such model.
    """
    if config.kind != "auto" or config.format != "auto":
        option = "kind" if config.kind != "auto" else "format"
        raise OptionError(
            f"--{option} {getattr(config, option)} does not fit {found.path}, which is of a "
            "segmenter or detector; leave it out (--init of segment train and detect train takes "
            "its trunk)"
        )
    if found.ours is not None:
        return _of_ours(config, found.ours, found)
    kind = kind_of_backbone(found)
    assert kind is not None
    bare, sizes = _sizes(config, found)
    task = SEGMENT if kind == "segmentation" else DETECT
    renamed = {name: name for name in found.state}
    if kind != "segmentation":
        renamed = own_names(found.state, kind)
    state = {own: found.state[name] for name, own in renamed.items()}
    heads = _segmenter(found) if task == SEGMENT else _detector(found, kind)
    model = blank(task + bare, **sizes, **heads)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    state = {key: value for key, value in state.items() if key in shapes}
    check_shapes(state, shapes, found, task + bare)
    missing = [key for key in shapes if key not in state]
    needed = [key for key in missing if not key.endswith(COUNTER)]
    if needed:
        raise WeightsError(f"{found.path} lacks {few(needed)}; {task}{bare} needs them all")
    state |= {key: torch.zeros((), dtype=torch.int64) for key in missing}
    own = {key: state[key].clone(memory_format=torch.contiguous_format) for key in shapes}
    read = {name for name, key in renamed.items() if key in own}
    classes = _classes(found, model.config["num_classes"])
    return DenseWeights(task[:-1], task + bare, model.config, own, read, missing, classes)


def _of_ours(config: ConvertConfig, ours: Weights, found: ForeignWeights) -> DenseWeights:
    if config.model not in (None, ours.model):
        raise OptionError(
            f"--model {config.model!r}, but --checkpoint {config.checkpoint!r} is of {ours.model}"
        )
    size = ours.config.get("img_size", 0)
    if config.input_size is not None and as_pair(config.input_size) != as_pair(size):
        raise OptionError(
            f"--input_size {config.input_size}: {found.path} sees pictures of any size, and its "
            "relative positions are resampled for them as they come; leave it out"
        )
    task = split_task(ours.model)[0]
    described = (dict(ours.config), dict(ours.state), set(ours.state))
    return DenseWeights(task[:-1], ours.model, *described, [], ours.classes)


def _sizes(config: ConvertConfig, found: ForeignWeights) -> tuple[str, dict[str, Any]]:
    """The backbone's name, and what `create_model` takes of it."""
    trunk, _ = trunk_of(found)
    encoder = read_encoder(trunk)
    heads = _num_heads(trunk, encoder)
    if config.num_heads not in (None, heads):
        raise OptionError(
            f"--num_heads {config.num_heads}, but the relative positions of {found.path} are of "
            f"{heads} heads"
        )
    bare = f"convvit_{encoder.size or 'base'}"
    given = split_task(config.model or bare)[1]
    if given != bare and encoder.size is not None:
        raise OptionError(f"--model {config.model!r}, but {found.path} is of {bare}")
    described = {
        "embed_dim": encoder.embed_dim,
        "depth": encoder.depth,
        "num_heads": heads,
        "mlp_ratio": encoder.mlp_ratio,
    }
    usual = SIZES[bare.removeprefix("convvit_")]
    sizes = {key: value for key, value in described.items() if value != usual[key]}
    return bare, sizes | {"in_chans": encoder.in_chans, "img_size": _img_size(config, trunk)}


def _num_heads(trunk: ForeignWeights, encoder: Encoder) -> int:
    """Attention heads: columns of tables, or of decomposed positions the width of one."""
    for name, value in trunk.state.items():
        if name.endswith(TABLE) and value.dim() == 2:
            return value.shape[1]
        if name.endswith("rel_pos_h") and value.dim() == 2 and value.shape[1]:
            return encoder.embed_dim[2] // value.shape[1]
    raise WeightsError(
        f"{trunk.path} has no relative positions (*.{TABLE}, *.rel_pos_h), as official segmenters "
        f"and detectors have; it holds {few(trunk.state)}"
    )


def _img_size(config: ConvertConfig, trunk: ForeignWeights) -> tuple[int, int]:
    """Height and width that the positions of a file are made for."""
    lengths = _lengths(trunk)
    if lengths:
        side = (max(lengths.values()) + 1) // 2 * PATCH
        return side, side
    given = None if config.input_size is None else as_pair(config.input_size)
    grid = grid_of(trunk, None if given is None else (given[0] // PATCH, given[1] // PATCH))
    return grid[0] * PATCH, grid[1] * PATCH


def _lengths(trunk: ForeignWeights) -> dict[int, int]:
    """How many distances of rows each block of stage 3 has, where they are decomposed."""
    pattern = re.compile(r"blocks3\.(\d+)\.attn\.rel_pos_h")
    found = {pattern.fullmatch(name): value for name, value in trunk.state.items()}
    return {int(match[1]): len(value) for match, value in found.items() if match is not None}


def _segmenter(found: ForeignWeights) -> dict[str, Any]:
    """What the tensors of an official segmenter tell of its heads."""
    classes, width = shape_of(found, "decode_head.conv_seg.weight", 4)[:2]
    aux = "auxiliary_head.conv_seg.weight"
    return {
        "num_classes": classes,
        "head": "upernet",
        "head_width": width,
        "aux_width": shape_of(found, aux, 4)[1] if aux in found.state else 0,
    }


def _detector(found: ForeignWeights, kind: str) -> dict[str, Any]:
    """What the tensors of an official detector tell of its windows, pyramid and heads."""

    def count(prefix: str) -> int:
        pattern = re.compile(re.escape(prefix) + r"\d+\.weight")
        return sum(pattern.fullmatch(name) is not None for name in found.state)

    masks = any(name.startswith(MASK) for name in found.state)
    batch = any(name.startswith(BOX) and name.endswith("running_mean") for name in found.state)
    options = {
        "kind": kind,
        "num_classes": shape_of(found, "roi_heads.box_predictor.cls_score.weight", 2)[0] - 1,
        "masks": masks,
        "width": shape_of(found, f"{RPN}objectness_logits.weight", 4)[1],
        "norm": "batch" if batch else "layer",
        "rpn_convs": count(f"{RPN}conv.conv"),
        "box_convs": count(f"{BOX}conv"),
        "box_features": shape_of(found, f"{BOX}fc1.weight", 2)[0],
    }
    if masks:
        options["mask_convs"] = count(f"{MASK}mask_fcn")
    return options | _windows(found, kind)


def _windows(found: ForeignWeights, kind: str) -> dict[str, Any]:
    """What the sizes of relative positions tell of the windows."""
    trunk, _ = trunk_of(found)
    if kind == "detection":
        rows = shape_of(trunk, f"windowed_rel_pos_bias.{TABLE}", 2)[0]
        grid = square_grid(rows)
        if grid is None:
            raise WeightsError(f"{found.path} has windows of {rows} distances, which is no square")
        return {"window_size": grid[0]}
    lengths = _lengths(trunk)
    window, whole = min(lengths.values()), max(lengths.values())
    if window == whole:  # windows as large as the map: which blocks have them does not matter
        return {"window_size": (window + 1) // 2}
    seeing_all = [block for block, length in sorted(lengths.items()) if length == whole]
    return {"window_size": (window + 1) // 2, "global_blocks": seeing_all}


def _classes(found: ForeignWeights, count: int) -> ClassNames | None:
    names = found.options.get("classes")
    return ClassNames(names) if names is not None and len(set(names)) == count else None


# -- back -----------------------------------------------------------------------------------------


def official_file(weights: Weights, with_indices: bool = False) -> dict[str, Any]:
    """What the official code of a segmenter or detector writes, as far as the model tells it.

    Args:
        weights: of a model of ours.
        with_indices: with the index buffers of relative positions, which can be large and which the
            official code computes itself.

    Raises:
        OptionError: the official code has no such model.
    """
    task, bare = split_task(weights.model)
    head = weights.config.get("head", "upernet")
    if is_timm_name(bare) or head != "upernet":
        kind = "segmenter" if task == SEGMENT else "detector"
        what = f"with the head {head!r}" if head != "upernet" else "of a network of timm"
        raise OptionError(
            f"--output: the official code has no {kind} {what}, and {weights.path} is one; write a "
            ".safetensors file"
        )
    if task == SEGMENT:
        state = dict(weights.state)
        if with_indices:
            state |= _indices(state)
        told = weights.classes is not None and not isinstance(weights.classes, ClassNumbers)
        meta = {"CLASSES": tuple(weights.classes or ())} if told else {}
        return {"meta": meta, "state_dict": state, "optimizer": {}}
    names = official_names(weights.state, weights.config["kind"])
    state = {official: weights.state[name] for name, official in names.items()}
    if with_indices:
        state |= _indices(state)
    return {"model": state}


def _indices(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The index buffer of each table of relative positions."""
    found: dict[str, Tensor] = {}
    shared: dict[int, Tensor] = {}  # tables of several blocks are of one size
    for name, table in state.items():
        grid = square_grid(len(table)) if name.endswith(TABLE) else None
        if grid is None and name.endswith(TABLE):
            raise OptionError(
                f"--index_buffers: {name} of {len(table)} distances is of no square, which the "
                "official code does not write; leave it out"
            )
        if grid is not None:
            index = shared.setdefault(grid[0], relative_position_index(grid))
            found[name.replace(TABLE, INDEX_BUFFER)] = index
    return found
