"""Models by name."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
from typing import Any

from convmae.models.cnn import names
from convmae.models.convmae import ConvMAE
from convmae.models.convvit import ConvViT
from convmae.models.fastconvmae import FastConvMAE
from convmae.models.sizes import SIZES
from convmae.models.task_names import DETECT, SEGMENT, split_task

DECODER = {"decoder_embed_dim": 512, "decoder_depth": 8, "decoder_num_heads": 16}
TINY_DECODER = {"decoder_embed_dim": 192, "decoder_depth": 2, "decoder_num_heads": 6}

ALIASES = {
    "convmae_convvit_base_patch16": "convmae_base",
    "convmae_convvit_base_patch16_dec512d8b": "convmae_base",
    "convvit_base_patch16": "convvit_base",
    "fastconvmae_convvit_base_patch16": "fastconvmae_base",
    "fastconvmae_convvit_base_patch16_dec512d8b": "fastconvmae_base",
}


def _models() -> dict[str, tuple[type[ConvMAE] | type[ConvViT], dict[str, Any]]]:
    models: dict[str, tuple[type[ConvMAE] | type[ConvViT], dict[str, Any]]] = {}
    for size, config in SIZES.items():
        decoder = TINY_DECODER if size == "tiny" else DECODER
        models[f"convmae_{size}"] = ConvMAE, config | decoder
        models[f"fastconvmae_{size}"] = FastConvMAE, config | decoder
        models[f"convvit_{size}"] = ConvViT, config
    return models


MODELS = _models()
BACKBONES = [name for name in MODELS if name.startswith("convvit_")]  # of dense tasks


def list_models(pattern: str = "*") -> list[str]:
    """The names that `create_model` knows and that match a shell pattern, sorted; no aliases.

    Args:
        pattern: for example `"convmae_*"`; `"timm:*"` are the networks of timm, transformers among
            them, which `create_model` refuses; `"segment:*"` and `"detect:*"` those that can
            segment and detect.
    """
    task, bare = split_task(pattern)
    if task:
        known = list_models(bare) if names.is_timm_name(bare) else BACKBONES
        return sorted(fnmatch.filter((task + name for name in known), pattern))
    if names.is_timm_name(pattern):
        return names.list_networks(pattern)
    return sorted(fnmatch.filter(MODELS, pattern))


def full_name(name: str) -> str:
    """The name that an alias stands for; other names as they are."""
    task, bare = split_task(name)
    return task + ALIASES.get(bare, bare)


def create_model(name: str, **overrides: Any) -> Any:
    """`ConvMAE(**sizes_of_name, **overrides)` or another model, with fresh parameters.

    Args:
        name: `convmae_{tiny,small,base,large,huge}` and `fastconvmae_{...}` to pretrain,
            `convvit_{...}` to classify, `segment:convvit_{...}` to segment and
            `detect:convvit_{...}` to detect; or the official `convmae_convvit_base_patch16`,
            `fastconvmae_convvit_base_patch16`, either of them with `_dec512d8b`, or
            `convvit_base_patch16`. Base is the official size, tiny is ours; small, large and huge
            are sizes of third-party code, as there are no official ones. Or `timm:` and the name
            of a convolutional network of timm: with `method="spark"` or `"fcmae"` to pretrain it,
            with `num_classes=...` to classify, and with `segment:` or `detect:` before it.
        **overrides: any argument of the model's class, such as `img_size=(128, 256)`.

    Raises:
        ValueError: there is no such model, or a size does not fit.
        TypeError: the model has no such argument.
    """
    if names.is_timm_name(str(name)):
        return _create_timm_model(name, **overrides)
    known_name = full_name(str(name))
    if known_name.startswith(SEGMENT):
        return _create_segmenter(known_name, **overrides)
    if known_name.startswith(DETECT):
        return _create_detector(known_name, **overrides)
    if known_name not in MODELS:
        close = difflib.get_close_matches(str(name), [*MODELS, *ALIASES])
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(MODELS)}"
        raise ValueError(f"there is no model {name!r}; {hint}")
    model, config = MODELS[known_name]
    names.check_arguments(name, overrides, list(inspect.signature(model).parameters))
    return model(**(config | overrides))


def _create_timm_model(name: str, method: str | None = None, **options: Any) -> Any:
    """A network of timm: to pretrain by a method, or to classify without one."""
    if method is not None:
        return names.create_pretraining_model(name, method, **options)
    names.timm_name(name)
    from convmae.models.cnn.classifier import create_classifier

    return create_classifier(name, **options)


def _create_detector(name: str, **options: Any) -> Any:
    from convmae.models.dense_tasks.detector import create_detector

    return create_detector(name, **options)


def _create_segmenter(name: str, **options: Any) -> Any:
    from convmae.models.dense_tasks.segmenter import create_segmenter

    return create_segmenter(name, **options)
