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
`checkpoint_path`, or `pretrained_cfg_overlay={"file": path}` with `pretrained=True`.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from convmae.models.convvit import NUM_FEATURES, ConvViT, feature_indices
from convmae.models.registry import ALIASES, MODELS

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
    config = MODELS[ALIASES.get(name, name)][1]
    feature_cfg = {"out_indices": tuple(range(NUM_FEATURES)), "feature_cls": "getter"}
    return build_model_with_cfg(
        ConvViT, name, pretrained, feature_cfg=feature_cfg, **{**config, **options}
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
