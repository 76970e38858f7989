"""Weights of any origin into the backbone of a segmenter or detector, for `--init`.

The trunk has the same names in all of them, behind a prefix:

    pretraining, classifiers: none          segmenters: `backbone.`
    detectors with an FPN: `backbone.`, in official files `backbone.bottom_up.`
    detectors with a simple pyramid: `backbone.net.`

What a file has besides is left out (decoder, classifier, heads), and what only the backbone has
keeps its values: scales of branches, relative positions, the convolution of stride 32.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convmae.config import WeightsError
from convmae.config.checks import as_pair
from convmae.models.adapt import adapt_channels, fit_position
from convmae.models.cnn.names import is_timm_name
from convmae.models.dense_tasks.backbone import INDEX_BUFFER, fit_relative_positions
from convmae.models.dense_tasks.positions import resample_table
from convmae.models.dense_tasks.simple_pyramid import SimpleFeaturePyramid
from convmae.models.dense_tasks.timm_backbone import TimmBackbone
from convmae.models.sizes import SIZES
from convmae.models.task_names import split_task
from convmae.weights.architecture import PATCH, Encoder, grid_of, read_encoder
from convmae.weights.foreign import ForeignWeights, few, open_foreign
from convmae.weights.networks import network_in
from convmae.weights.pretrained import (
    LoadReport,
    change,
    check_shapes,
    classifier_for,
    load_pretrained,
    note_adapted,
    put_tensors,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from convmae.models.dense_tasks.backbone import ConvViTBackbone
    from convmae.weights.checkpoint import Weights

FIRST = "patch_embed1.proj.weight"
TRUNKS = ("backbone.bottom_up.", "backbone.net.", "backbone.")  # tried in this order
TABLE = "relative_position_bias_table"
# What pretraining has not: parts of names, of which one may be absent from a file.
ONLY_IN_BACKBONES = ("gamma_1", "gamma_2", TABLE, "rel_pos_h", "rel_pos_w", "fpn.")


def load_trunk(
    backbone: ConvViTBackbone | SimpleFeaturePyramid | TimmBackbone,
    weights: ForeignWeights | str | Path,
    adapt_input: str = "auto",
) -> LoadReport:
    """Puts the trunk of weights of any origin into a backbone, in place.

    The position embedding and tables of relative positions are resampled bicubic to the grid of
    the backbone, decomposed relative positions along a line, the first convolution is fitted to its
    channels. Scales of branches (`gamma_1`, `gamma_2`) that a backbone has not are multiplied into
    the layers before them.

    Args:
        backbone: what `create_backbone` makes, also within a `SimpleFeaturePyramid`.
        weights: a run's folder of any task, a `.safetensors` or PyTorch file, official ones of
            pretraining, finetuning, segmentation and detection among them, or what `open_foreign`
            found. For a network of timm weights of that network.
        adapt_input: for other channels, as in `convmae.load_model`.

    Returns:
        What was loaded, what stayed fresh, what was left out; `print` it.

    Raises:
        WeightsError: there is no such file, or it is of another architecture. The backbone is
            unchanged.
        ValueError: `adapt_input` is none of these.
    """
    found = weights if isinstance(weights, ForeignWeights) else open_foreign(weights)
    net: Any = backbone.net if isinstance(backbone, SimpleFeaturePyramid) else backbone
    trunk, others = trunk_of(found)
    if isinstance(net, TimmBackbone):
        report = load_pretrained(net, trunk, adapt_input)
    else:
        report = _load_convvit(net, trunk, adapt_input)
    indices = [name for name in report.unexpected if name.endswith(INDEX_BUFFER)]
    report.unexpected = [name for name in report.unexpected if name not in indices]
    report.left_out = [*report.left_out, *others]
    return report


def backbone_of(found: ForeignWeights) -> str | None:
    """The backbone that weights are of, such as `convvit_base`; None if of no known size.

    Raises:
        WeightsError: the tensors are those of no trunk that is known.
    """
    trunk, _ = trunk_of(found)
    if trunk.ours is None and FIRST not in trunk.state:
        return None
    return classifier_for(trunk)


def trunk_of(found: ForeignWeights) -> tuple[ForeignWeights, list[str]]:
    """The trunk in a file by its names in pretraining, and the names of the file's other tensors.

    What a pretraining model or a classifier has besides its encoder stays.
    """
    prefix = _prefix(found)
    ours = None if found.ours is None else _as_trunk(found.ours, prefix)
    if not prefix:
        return replace(found, ours=ours), []
    state = {k.removeprefix(prefix): v for k, v in found.state.items() if k.startswith(prefix)}
    others = [name for name in found.state if not name.startswith(prefix)]
    return replace(found, state=state, ours=ours), others


def _prefix(found: ForeignWeights) -> str:
    """What the names of a trunk begin with in a file."""
    if found.ours is not None and not split_task(found.ours.model)[0]:
        return ""
    return next((p for p in TRUNKS if any(name.startswith(p) for name in found.state)), "")


def _as_trunk(weights: Weights, prefix: str) -> Weights:
    """Weights of a segmenter or detector of ours as those of its backbone; others as they are."""
    task, bare = split_task(weights.model)
    if not task:
        return weights
    state = {k.removeprefix(prefix): v for k, v in weights.state.items() if k.startswith(prefix)}
    config: dict[str, Any] = {"in_chans": weights.config.get("in_chans", 3), "num_classes": 0}
    if not is_timm_name(bare):
        config["img_size"] = list(as_pair(weights.config["img_size"]))
        usual = SIZES[bare.removeprefix("convvit_")]["num_heads"]
        config["num_heads"] = weights.config.get("num_heads", usual)
    return replace(weights, model=bare, config=config, state=state)


def _load_convvit(net: ConvViTBackbone, trunk: ForeignWeights, adapt_input: str) -> LoadReport:
    """`load_trunk` of a ConvViT."""
    own = net.state_dict()
    encoder = _check_architecture(net, trunk, own)
    state = {key: value for key, value in trunk.state.items() if key in own}
    resampled = _fit_positions(net, trunk, state)
    folded = _fold_scales(trunk.state, state, own)
    adapted = adapt_channels(state, net.in_chans, adapt_input)
    shapes = {key: tuple(value.shape) for key, value in own.items()}
    check_shapes(state, shapes, trunk, "the backbone")
    fresh = ("patch_embed1.proj.",) if adapted and adapt_input == "fresh" else ()
    missing = [key for key in own if key not in state]
    needed = [key for key in missing if not _may_lack(key) and not key.startswith(fresh)]
    if needed:
        raise WeightsError(f"{trunk.path} lacks {few(needed)}, which {_words(encoder)} has")
    report = put_tensors(net, trunk, state, "", keeps_head=False)
    report.resampled, report.notes = resampled, [*trunk.notes, *folded]
    note_adapted(report, trunk, adapted, encoder.in_chans)
    return report


def _may_lack(name: str) -> bool:
    return any(part in name for part in ONLY_IN_BACKBONES)


def _words(encoder: Encoder) -> str:
    return f"convvit_{encoder.size}" if encoder.size else f"a ConvViT of {encoder}"


def _check_architecture(
    net: ConvViTBackbone, trunk: ForeignWeights, own: Mapping[str, Tensor]
) -> Encoder:
    """The sizes of the trunk in a file, which are those of the backbone.

    Raises:
        WeightsError: they are not; the message names both.
    """
    mine = read_encoder(ForeignWeights(Path("the backbone"), "", dict(own)))
    if FIRST not in trunk.state or (trunk.ours is not None and is_timm_name(trunk.ours.model)):
        name = network_in(trunk)
        hint = f"or --model {name}" if is_timm_name(name) else "or --model timm:NAME"
        raise WeightsError(
            f"{trunk.path} is of {name}, but the backbone is {_words(mine)}; give weights of such "
            f"a backbone, {hint}"
        )
    theirs = read_encoder(trunk)
    sizes = [(e.embed_dim, e.depth, e.mlp_ratio) for e in (theirs, mine)]
    if sizes[0] != sizes[1]:
        fits = f", or --model convvit_{theirs.size}" if theirs.size else ""
        raise WeightsError(
            f"{trunk.path} is of {_words(theirs)} ({theirs}), but the backbone is {_words(mine)} "
            f"({mine}); give weights of such a backbone{fits}"
        )
    blocks: Any = net.blocks3
    heads = blocks[0].attn.num_heads
    told = trunk.ours.config.get("num_heads", heads) if trunk.ours is not None else heads
    if told != heads:
        raise WeightsError(
            f"{trunk.path} is of {_words(theirs)} with {told} attention heads, but the backbone "
            f"has {heads}"
        )
    return theirs


def _fit_positions(
    net: ConvViTBackbone, trunk: ForeignWeights, state: dict[str, Tensor]
) -> list[str]:
    """Fits all positions to the grids of a backbone, in `state`; what was done, in words."""
    old, new = grid_of(trunk), net.position_grid
    done = []
    if old != new:
        if state["pos_embed"].shape[:2] != (1, old[0] * old[1]):
            raise WeightsError(
                f"{trunk.path} has pos_embed of shape {list(state['pos_embed'].shape)}, but "
                f"pictures of {old[0]} x {old[1]} patches"
            )
        state["pos_embed"], _ = fit_position(state["pos_embed"], old, new, False, antialias=False)
        done.append(f"pos_embed: {change(old, new)}")
    before = {key: value.shape[0] for key, value in state.items() if value.dim() == 2}
    _fit_rectangles(net, trunk, state)
    fit_relative_positions(net, state)
    done += [
        f"{key}: {before[key]} -> {state[key].shape[0]} distances"
        for key in before
        if state[key].shape[0] != before[key]
    ]
    return done


def _fit_rectangles(net: ConvViTBackbone, trunk: ForeignWeights, state: dict[str, Tensor]) -> None:
    """Resamples tables of whole maps that are no squares, whose grid a file of ours tells."""
    if trunk.ours is None or "img_size" not in trunk.ours.config:
        return
    height, width = as_pair(trunk.ours.config["img_size"])
    old = height // PATCH, width // PATCH
    rows = (2 * old[0] - 1) * (2 * old[1] - 1)
    for name in [n for n in state if n.endswith(TABLE) and old[0] != old[1]]:
        if len(state[name]) == rows:
            owner: Any = net.get_submodule(name.rpartition(".")[0])
            table = resample_table(state[name].float(), old, owner.grid)
            state[name] = table.to(state[name].dtype).contiguous()


def _fold_scales(
    source: Mapping[str, Tensor], state: dict[str, Tensor], own: Mapping[str, Tensor]
) -> list[str]:
    """Multiplies scales that a backbone has not into the layers whose outputs they scale."""
    layers = {"gamma_1": "attn.proj", "gamma_2": "mlp.fc2"}
    folded = 0
    for name, scale in source.items():
        block, _, kind = name.rpartition(".")
        if kind not in layers or name in own:
            continue
        for part in ("weight", "bias"):
            layer = f"{block}.{layers[kind]}.{part}"
            if layer in state:
                value = state[layer]
                state[layer] = value * scale.reshape(-1, *[1] * (value.dim() - 1))
        folded += 1
    return [f"{folded} scales of branches are multiplied into the layers before"] if folded else []
