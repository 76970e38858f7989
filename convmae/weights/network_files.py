"""Writes networks as others read them: plain timm state dicts, and SparK's official files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from convmae.config import OptionError
from convmae.models.cnn.names import PREFIX
from convmae.weights.cnn_names import (
    SPARK_CONFIG,
    SPARK_PREFIX,
    is_official_convnext,
    official_network,
)
from convmae.weights.networks import network_prefix
from convmae.weights.tensor_files import save_safetensors, save_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

SAFETENSORS = ".safetensors"
TIMM_WEIGHTS = "timm.safetensors"  # in the folder of a run that pretrains one of timm's networks
_BEHIND_MAPS = ("norm.", "head.")  # of a ConvNeXt, which SparK has not while it pretrains


def write_timm_weights(
    path: Path, model: nn.Module, weights: Mapping[str, Tensor] | None = None
) -> None:
    """The network of a model as a plain timm state dict.

    `timm.create_model(NAME, num_classes=0, checkpoint_path=path)` reads it; of a classifier
    `num_classes` is its own.

    Args:
        path: a `.safetensors` file, or any other for `torch.save`. It is replaced as a whole by
            whoever calls.
        model: a `SparK`, an `FCMAE` or a classifier of one of timm's networks.
        weights: its state dict, where the model itself has it in parts; else its own.
    """
    prefix = network_prefix(model)
    state = model.state_dict() if weights is None else weights
    write_plain(path, {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})


def write_plain(path: Path, state: Mapping[str, Tensor]) -> None:
    """A bare state dict: a `.safetensors` file, or any other for `torch.save`.

    Raises:
        OSError: the disk refuses.
    """
    # Of their own memory: safetensors takes none that two tensors share.
    tensors = {key: v.detach().cpu().contiguous().clone() for key, v in state.items()}
    if path.suffix == SAFETENSORS:
        save_safetensors(tensors, path, {"format": "pt"})
    else:
        save_tensors(tensors, path)


def spark_file(
    name: str, config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> tuple[dict[str, Any], list[str]]:
    """What SparK's own code writes of a SparK model, and what there is to say about it.

    Args:
        name: of the model, `timm:resnet50`.
        config: of the `SparK`.
        state: its state dict.

    Raises:
        OptionError: pictures are not square, which SparK's code does not have.
    """
    height, width = config["img_size"]
    if height != width:
        raise OptionError(
            f"--output: an official SparK file is of square pictures, and this model's are of "
            f"{height} x {width} pixels; --input_size takes a side, which no tensor depends on"
        )
    network = {k.removeprefix(SPARK_PREFIX): v for k, v in state.items() if _is_network(k)}
    official = official_network(network)
    dropped = []
    if is_official_convnext(official):
        dropped = [key for key in official if key.startswith(_BEHIND_MAPS)]
    module: dict[str, Any] = {
        SPARK_PREFIX + key: value for key, value in official.items() if key not in dropped
    }
    module |= {key: value for key, value in state.items() if not _is_network(key)}
    channels = config["in_chans"]
    module |= {
        "imn_m": torch.zeros(1, channels, 1, 1),
        "imn_s": torch.zeros(1, channels, 1, 1),
        "norm_black": torch.zeros(1, channels, height, width),
        SPARK_CONFIG: {
            "mask_ratio": config["mask_ratio"],
            "densify_norm_str": config["densify_norm"],
            "sbn": False,
            "hierarchy": sum(key.startswith("mask_tokens.") for key in state),
            "sparse_encoder.input_size": height,
            "dense_decoder.width": config["decoder_width"],
        },
    }
    arch = name.removeprefix(PREFIX)
    described = {
        "args": f"model={arch}, input_size={height}, mask={config['mask_ratio']}",
        "input_size": height,
        "arch": arch,
        "epoch": 0,
        "performance_desc": "",
        "module": module,
        "optimizer": {},
        "is_pretrain": True,
    }
    notes = [] if config["norm_pix_loss"] else ["SparK's code always has norm_pix_loss"]
    if dropped:
        notes.append(f"SparK's ConvNeXt has no {' and '.join(dropped)}: left out")
    return described, notes


def _is_network(key: str) -> bool:
    return key.startswith(SPARK_PREFIX)
