"""ConvViT in timm's registry: `timm.create_model("convvit_base", features_only=True)`.

timm does not find models of other packages by itself, so this module must be imported:

    import convmae, timm

    convmae.register_timm()
    backbone = timm.create_model("convvit_base", features_only=True, img_size=(384, 288))
    maps = backbone(images)  # strides 4, 8, 16, 32; backbone.feature_info.channels()

The names are `convvit_{tiny,small,base,large,huge}` and `convvit_base_patch16`. They take the
arguments of `convmae.models.ConvViT`, `features_only` and `out_indices` (in any order, negative
from the end). The maps come from `ConvViT.forward_intermediates`; hooks see no maps here, so
`feature_cls` may only be "getter", timm's class for that. There are no weights to download: pass
`checkpoint_path`, a file, or `pretrained_cfg_overlay={"file": path}` with `pretrained=True`, where
the path may be a run's folder, too, and works with `features_only`. Of a pretraining model the
encoder is taken. Other sizes of pictures (`img_size`) and numbers of channels (`in_chans`) are
fitted; a warning says what was done, and what stays fresh.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import FeatureGetterNet

import convmae
from convmae.config import WeightsWarning
from convmae.models.adapt import DECODER, adapt_channels
from convmae.models.convvit import NUM_FEATURES, ConvViT, feature_indices
from convmae.models.registry import ALIASES, MODELS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

__all__: list[str] = []  # `register_model` adds the names

_NAMES = [name for name in [*MODELS, *ALIASES] if name.startswith("convvit_")]
MAX_STRIDE = 32
_SOURCES = ("file", "url", "hf_hub_id", "state_dict")

default_cfgs = generate_default_cfgs(
    {
        name: {
            "input_size": (3, 224, 224),
            "fixed_input_size": True,
            "num_classes": 1000,
            "pool_size": None,
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "patch_embed1.proj",
            "classifier": "head",
        }
        for name in _NAMES
    }
)


class TimmConvViT(ConvViT):
    """A `ConvViT` that takes weights as timm hands them over."""

    def load_pretrained(self, path: str | Path) -> None:
        """`convmae.load_pretrained(self, path)`, which timm calls for a file of weights."""
        report = convmae.load_pretrained(self, path)
        if report.missing or report.resampled or report.adapted:
            warnings.warn("; ".join(report.lines()), WeightsWarning, stacklevel=2)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As `torch.nn.Module` has it; of a pretraining model the encoder, said in a warning.

        Tensors of the encoder may not be missing. A first convolution of other channels is fitted.
        """
        state = dict(state_dict)
        notes = [adapt_channels(state, self.in_chans)]
        behind = ("head.", "fc_norm.")
        if strict and (_any(state, DECODER) or not _any(state, behind)):
            own = self.state_dict()
            fresh = [k for k in own if k.startswith(behind) and k not in state]
            extra = [k for k in state if k.startswith((*DECODER, "norm.")) and k not in own]
            state = {k: v for k, v in state.items() if k not in extra} | {k: own[k] for k in fresh}
            if fresh or extra:
                notes.append(
                    f"these are weights of a pretraining model: the encoder is taken, {len(extra)} "
                    f"tensors behind it are left out; fresh: {', '.join(fresh) or 'nothing'}"
                )
        said = [note for note in notes if note]
        if said:
            warnings.warn("; ".join(said), WeightsWarning, stacklevel=2)
        return super().load_state_dict(state if said else state_dict, strict, assign)


def _any(names: Iterable[str], prefixes: tuple[str, ...]) -> bool:
    return any(name.startswith(prefixes) for name in names)


class TimmFeatures(FeatureGetterNet):
    """`features_only` that takes the weights of whole models too, as `checkpoint_path` has them."""

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As `torch.nn.Module` has it; what the maps do not need is left out, with a warning."""
        if not strict or any(key.startswith("model.") for key in state_dict):
            return super().load_state_dict(state_dict, strict, assign)
        own = self.model.state_dict()
        parts = ("pos_embed", "patch_embed", "blocks", "fc_norm.", "head.")
        extra = [key for key in state_dict if key not in own and key.startswith(parts)]
        if extra:
            warnings.warn(
                f"features_only: {len(extra)} tensors that its maps do not need are left out",
                WeightsWarning,
                stacklevel=2,
            )
        rest = {key: value for key, value in state_dict.items() if key not in extra}
        return self.model.load_state_dict(rest, strict, assign)


def _create(name: str, pretrained: bool = False, drop_rate: float = 0.0, **options: Any) -> Any:
    """`ConvViT(**sizes_of_name, **options)` by `timm.models.build_model_with_cfg`.

    Raises:
        ValueError: `pretrained` without a file of weights, `drop_rate` is not 0, or an option of
            `features_only` is none that this model has.
    """
    _check_features(name, options)
    if drop_rate:
        raise ValueError(
            f"drop_rate must be 0, got {drop_rate}: {name} has no dropout, only drop_path_rate"
        )
    given = [options.get(key) or {} for key in ("pretrained_cfg", "pretrained_cfg_overlay")]
    if pretrained and not any(source in cfg for cfg in given for source in _SOURCES):
        raise ValueError(
            f"pretrained=True, but there are no weights of {name} to download. Expected "
            "pretrained=False, with checkpoint_path=... for a file of weights"
        )
    overlay = options.get("pretrained_cfg_overlay") or {}
    if overlay.get("file"):  # read by `load_pretrained`
        options["pretrained_cfg_overlay"] = {**overlay, "custom_load": True}
        if not pretrained:
            warnings.warn(
                f"{overlay['file']} is not read: timm does so with pretrained=True only",
                WeightsWarning,
                stacklevel=2,
            )
    config = MODELS[ALIASES.get(name, name)][1]
    feature_cfg = {"out_indices": tuple(range(NUM_FEATURES)), "feature_cls": TimmFeatures}
    return build_model_with_cfg(
        TimmConvViT, name, pretrained, feature_cfg=feature_cfg, **{**config, **options}
    )


def _check_features(name: str, options: dict[str, Any]) -> None:
    """The options of `features_only` are some that ConvViT has; takes out what is as it is anyway.

    Raises:
        ValueError: one is not.
    """
    stride = options.pop("output_stride", MAX_STRIDE)
    if stride != MAX_STRIDE:
        raise ValueError(
            f"output_stride must be {MAX_STRIDE}, got {stride!r}: {name} is not dilated; "
            "out_indices=(0, 1, 2) has the maps of strides 4, 8 and 16"
        )
    if not options.get("features_only"):
        given = [key for key in ("out_indices", "feature_cls") if key in options]
        if given:
            raise ValueError(f"{given[0]} is for features_only=True, which is not given")
        return
    kind = options.get("feature_cls", "getter")
    if getattr(kind, "__name__", str(kind).lower()) not in ("getter", "FeatureGetterNet"):
        raise ValueError(
            f"feature_cls must be 'getter' (or not given), got {kind!r}: the stages of {name} are "
            "no modules that return maps, so there is nothing for hooks or graphs to take"
        )
    if "out_indices" in options:
        options["out_indices"] = feature_indices(options["out_indices"], "out_indices")


@register_model
def convvit_tiny(pretrained: bool = False, **options: Any) -> Any:
    """`convmae.create_model("convvit_tiny", **options)` for timm."""
    return _create("convvit_tiny", pretrained, **options)


@register_model
def convvit_small(pretrained: bool = False, **options: Any) -> Any:
    """`convmae.create_model("convvit_small", **options)` for timm."""
    return _create("convvit_small", pretrained, **options)


@register_model
def convvit_base(pretrained: bool = False, **options: Any) -> Any:
    """`convmae.create_model("convvit_base", **options)` for timm."""
    return _create("convvit_base", pretrained, **options)


@register_model
def convvit_large(pretrained: bool = False, **options: Any) -> Any:
    """`convmae.create_model("convvit_large", **options)` for timm."""
    return _create("convvit_large", pretrained, **options)


@register_model
def convvit_huge(pretrained: bool = False, **options: Any) -> Any:
    """`convmae.create_model("convvit_huge", **options)` for timm."""
    return _create("convvit_huge", pretrained, **options)


@register_model
def convvit_base_patch16(pretrained: bool = False, **options: Any) -> Any:
    """`convmae.create_model("convvit_base_patch16", **options)` for timm."""
    return _create("convvit_base_patch16", pretrained, **options)
