"""Backbones by name."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from convmae.models.cnn.names import check_arguments, is_timm_name
from convmae.models.dense_tasks.convvit_backbones import (
    DetectionConvViT,
    SegmentationConvViT,
    ViTDetConvViT,
)
from convmae.models.dense_tasks.timm_backbone import TimmBackbone, create_timm_backbone
from convmae.models.sizes import SIZES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convmae.models.dense_tasks.backbone import ConvViTBackbone

KINDS: dict[str, type[ConvViTBackbone]] = {
    "segmentation": SegmentationConvViT,
    "detection": DetectionConvViT,
    "vitdet": ViTDetConvViT,
}
PREFIX = "convvit_"
WINDOW_OPTIONS = ("window_size", "global_blocks")
SIZE_OPTIONS = ("embed_dim", "depth", "num_heads", "mlp_ratio")


def create_backbone(
    name: str,
    kind: str,
    *,
    img_size: int | Sequence[int],
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    window_size: int | None = None,
    global_blocks: Sequence[int] | None = None,
    **sizes: Any,
) -> ConvViTBackbone | TimmBackbone:
    """A backbone with fresh parameters: pictures of any size to maps, finest first.

    Args:
        name: `convvit_{tiny,small,base,large,huge}`, or `timm:` and the name of a convolutional
            network of timm.
        kind: `"segmentation"`, `"detection"` or `"vitdet"`, whose classes say what they differ in:
            `SegmentationConvViT`, `DetectionConvViT`, `ViTDetConvViT`. Networks of timm are the
            same in all of them, a `TimmBackbone`.
        img_size: height and width that tables of positions are made for, multiples of 16; networks
            of timm have none.
        in_chans: channels of the pictures.
        drop_path_rate: stochastic depth of the last block.
        window_size: side of the windows in patches; None for 16 (detection) or 14 (vitdet).
        global_blocks: numbers of the blocks of stage 3 that see the whole map; None for those of
            the kind.
        **sizes: `embed_dim`, `depth`, `num_heads` or `mlp_ratio` other than those of the name.

    Raises:
        ValueError: there is no such name or kind, or a size does not fit.
        TypeError: the backbone has no such option.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    options: dict[str, Any] = {"window_size": window_size, "global_blocks": global_blocks}
    options = {key: value for key, value in options.items() if value is not None} | sizes
    if is_timm_name(name):
        check_arguments(name, options, ["in_chans", "drop_path_rate"])
        return create_timm_backbone(name, in_chans, drop_path_rate)
    known = [PREFIX + size for size in SIZES]
    if name not in known:
        close = difflib.get_close_matches(str(name), known, n=1)
        hint = f"did you mean {close[0]}? There are" if close else "there are"
        raise ValueError(
            f"there is no backbone {name!r}; {hint} {', '.join(known)}, and networks of timm such "
            "as timm:resnet50"
        )
    allowed = SIZE_OPTIONS if kind == "segmentation" else (*WINDOW_OPTIONS, *SIZE_OPTIONS)
    check_arguments(f"{name} for {kind}", options, list(allowed))
    config = SIZES[name.removeprefix(PREFIX)] | options
    return KINDS[kind](img_size, in_chans, drop_path_rate=drop_path_rate, **config)
