"""Names of a detector's tensors here and in the official files, which are detectron2's.

Values need no change, only names do: shapes and the order of classes, with the background last, are
the same. Two published configurations differ in the trunk and the pyramid:

    `detection`: `backbone.bottom_up.*`, and `backbone.fpn_*` with BatchNorms
    `vitdet`: `backbone.net.*`, and `backbone.simfp_*`, which have these names here as well

Below `backbone.bottom_up.` the names are those of the backbone here.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

KINDS = ("detection", "vitdet")
BACKBONES = {"detection": "backbone.bottom_up.", "vitdet": "backbone."}  # "backbone." here
FINEST = 2  # level of the finest map of the pyramid, of stride 2**2
# Tensors of official files that follow from the configuration: they are left out.
COMPUTED = (
    "pixel_mean",
    "pixel_std",
    "relative_position_index",
    "proposal_generator.anchor_generator.",
)
PREFIXES = (  # here, official; the names behind them are the same
    ("rpn.head.cls_logits.", "proposal_generator.rpn_head.objectness_logits."),
    ("rpn.head.bbox_pred.", "proposal_generator.rpn_head.anchor_deltas."),
    ("roi_heads.box_predictor.", "roi_heads.box_predictor."),
    ("roi_heads.mask_predictor.conv5_mask.", "roi_heads.mask_head.deconv."),
    ("roi_heads.mask_predictor.mask_fcn_logits.", "roi_heads.mask_head.predictor."),
)
# Numbered layers: prefix here, prefix there, number of the first there. The convolution of a layer
# is `0` here and has no name there; its norm is `1` here and `norm` there.
LAYERS = (
    ("pyramid.inner_blocks.", "backbone.fpn_lateral", FINEST),
    ("pyramid.layer_blocks.", "backbone.fpn_output", FINEST),
    ("rpn.head.conv.", "proposal_generator.rpn_head.conv.conv", 0),
    ("roi_heads.box_head.", "roi_heads.box_head.conv", 1),
    ("roi_heads.mask_head.", "roi_heads.mask_head.mask_fcn", 1),
)
OWN_LINEAR = re.compile(r"roi_heads\.box_head\.\d+\.(weight|bias)")
OFFICIAL_LINEAR = "roi_heads.box_head.fc1."


def official_names(names: Iterable[str], kind: str) -> dict[str, str]:
    """The official name of each tensor of a `Detector`.

    Args:
        names: of a detector's state dict.
        kind: the configuration of its backbone, one of `KINDS`.

    Returns:
        `{name: official name}`, in the order of `names`.

    Raises:
        ValueError: `kind` is not known, or a name is none of a detector.
    """
    _check_kind(kind)
    found = {name: _official_name(name, kind) for name in names}
    unknown = [name for name, official in found.items() if official is None]
    if unknown:
        raise ValueError(f"{unknown[0]} is no name of a tensor of a Detector")
    return {name: official for name, official in found.items() if official is not None}


def own_names(names: Iterable[str], kind: str) -> dict[str, str]:
    """The name here of each tensor of an official file; those of `COMPUTED` are left out.

    Args:
        names: of the file's `model`, all of them: the last layers are numbered behind the others.
        kind: the configuration, one of `KINDS`.

    Returns:
        `{official name: name}`, in the order of `names`, of those that are known.

    Raises:
        ValueError: `kind` is not known.
    """
    _check_kind(kind)
    names = list(names)
    convs = re.compile(r"roi_heads\.box_head\.conv\d+\.weight")
    linear = sum(convs.fullmatch(name) is not None for name in names) + 1  # a Flatten is between
    found = {name: _own_name(name, kind, linear) for name in names}
    return {official: name for official, name in found.items() if name is not None}


def is_computed(name: str) -> bool:
    """Whether an official tensor follows from the configuration, such as an index or an anchor."""
    return any(part in name for part in COMPUTED)


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")


def _official_name(name: str, kind: str) -> str | None:
    if name.startswith("backbone."):
        return BACKBONES[kind] + name.removeprefix("backbone.")
    if OWN_LINEAR.fullmatch(name):
        return OFFICIAL_LINEAR + name.rpartition(".")[2]
    for own, official in PREFIXES:
        if name.startswith(own):
            return official + name.removeprefix(own)
    for own, official, first in LAYERS:
        match = re.fullmatch(re.escape(own) + r"(\d+)\.([01])\.(\w+)", name)
        if match is not None:
            norm = "norm." if match[2] == "1" else ""
            return f"{official}{int(match[1]) + first}.{norm}{match[3]}"
    return None


def _own_name(name: str, kind: str, linear: int) -> str | None:
    if is_computed(name):
        return None
    if name.startswith(BACKBONES[kind]):
        return "backbone." + name.removeprefix(BACKBONES[kind])
    if name.startswith(OFFICIAL_LINEAR):
        return f"roi_heads.box_head.{linear}.{name.removeprefix(OFFICIAL_LINEAR)}"
    for own, official in PREFIXES:
        if name.startswith(official):
            return own + name.removeprefix(official)
    for own, official, first in LAYERS:
        match = re.fullmatch(re.escape(official) + r"(\d+)\.(norm\.)?(\w+)", name)
        if match is not None:
            return f"{own}{int(match[1]) - first}.{1 if match[2] else 0}.{match[3]}"
    return None
