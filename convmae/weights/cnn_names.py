"""Names of tensors in the official files of SparK and ConvNeXt V2, and in timm: both ways."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from convmae.config import WeightsError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

SPARK_PREFIX = "sparse_encoder.sp_cnn."
FCMAE_PREFIX = "encoder."
# Buffers that SparK's code writes and never reads; they may hold anything, NaN too.
UNUSED = ("imn_m", "imn_s", "norm_black")
SPARK_CONFIG = "config"  # a dictionary among SparK's tensors

# The parts of a ConvNeXt: (official name, timm's name) as patterns of the begin of a name.
_PLACES = (
    (r"downsample_layers\.0\.(\d+)\.", r"stem.\1.", r"stem\.(\d+)\.", r"downsample_layers.0.\1."),
    (
        r"downsample_layers\.(\d+)\.(\d+)\.",
        r"stages.\1.downsample.\2.",
        r"stages\.(\d+)\.downsample\.(\d+)\.",
        r"downsample_layers.\1.\2.",
    ),
    (
        r"stages\.(\d+)\.(\d+)\.",
        r"stages.\1.blocks.\2.",
        r"stages\.(\d+)\.blocks\.(\d+)\.",
        r"stages.\1.\2.",
    ),
    (r"norm\.(?=weight$|bias$)", "head.norm.", r"head\.norm\.", "norm."),
    (r"(?:head|fc)\.(?=weight$|bias$)", "head.fc.", r"head\.fc\.", "head."),
)
# What a block has: official names and timm's, at the end of a name.
_LAYERS = {
    "dwconv.weight": "conv_dw.weight",
    "dwconv.bias": "conv_dw.bias",
    "pwconv1.weight": "mlp.fc1.weight",
    "pwconv1.bias": "mlp.fc1.bias",
    "pwconv2.weight": "mlp.fc2.weight",
    "pwconv2.bias": "mlp.fc2.bias",
    "grn.gamma": "mlp.grn.weight",
    "grn.beta": "mlp.grn.bias",
}
_OFFICIAL_LAYERS = {timm: official for official, timm in _LAYERS.items()}
_BLOCK = re.compile(r"(stages\.\d+\.(?:blocks\.)?\d+\.)(.+)")


def official_to_timm(name: str) -> str:
    """timm's name of a tensor of a ConvNeXt (V2) that has this one in the official code."""
    for official, timm, _, _ in _PLACES:
        changed, count = re.subn("^" + official, timm, name)
        if count:
            return _with_layer(changed, _LAYERS)
    return name


def timm_to_official(name: str) -> str:
    """The official name of a tensor of a ConvNeXt (V2) that has this one in timm."""
    for _, _, timm, official in _PLACES:
        changed, count = re.subn("^" + timm, official, name)
        if count:
            return _with_layer(changed, _OFFICIAL_LAYERS)
    return name


def _with_layer(name: str, layers: Mapping[str, str]) -> str:
    """A name with what is in its block called as `layers` says."""
    parts = _BLOCK.fullmatch(name)
    return name if parts is None else parts[1] + layers.get(parts[2], parts[2])


def is_official_convnext(names: Mapping[str, Tensor]) -> bool:
    """Whether names without a prefix are those of the official ConvNeXt, not of timm's."""
    return any(name.startswith("downsample_layers.") for name in names)


def is_convnext_of_timm(names: Mapping[str, Tensor]) -> bool:
    """Whether names without a prefix are those of timm's ConvNeXt."""
    return "stem.0.weight" in names and "stages.0.blocks.0.conv_dw.weight" in names


def network_tensors(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Tensors of a pretraining model or of a network alone, by the names that ours have.

    The network has timm's names. Kernels of a sparse engine become those of dense convolutions.

    Args:
        state: as the file has them, wrappers' prefixes taken off.
        path: of the file, for messages.

    Raises:
        WeightsError: two tensors are the same one of the network, or a kernel is of no square.
    """
    prefix = _network_prefix(state)
    network = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if not is_official_convnext(network):
        return dict(state)
    others = {key: value for key, value in state.items() if not key.startswith(prefix)}
    # An encoder alone has no prefix in ours either: `encoder.` belongs to a model with a decoder.
    kept = "" if prefix == FCMAE_PREFIX and "mask_token" not in others else prefix
    for name, value in network.items():
        dense_name, value = _dense(name, value, path)
        new = kept + official_to_timm(dense_name)
        if new in others:
            raise WeightsError(f"{path} holds {new} twice, as {name!r} and under another name")
        others[new] = value
    return others


def _network_prefix(state: Mapping[str, Tensor]) -> str:
    for prefix in (SPARK_PREFIX, FCMAE_PREFIX):
        if any(name.startswith(prefix) for name in state):
            return prefix
    return ""


def _dense(name: str, value: Tensor, path: Path) -> tuple[str, Tensor]:
    """Name and shape in the official dense code of what its sparse code has."""
    name = name.replace(".norm.ln.", ".norm.").replace(".linear.", ".")
    name = re.sub(r"^(downsample_layers\.\d+\.\d+)\.ln\.", r"\1.", name)
    if name.endswith(".kernel"):
        return name.removesuffix("kernel") + "weight", _dense_kernel(name, value, path)
    if ".grn." in name and value.dim():
        return name, _vector(value)
    is_bias = name.endswith(".bias") and value.dim() == 2
    return name, _vector(value) if is_bias else value


def _vector(value: Tensor) -> Tensor:
    """`[1, ..., 1, C]` as `[C]`; other shapes as they are."""
    return value.reshape(-1) if value.shape[-1] == value.numel() else value


def _dense_kernel(name: str, kernel: Tensor, path: Path) -> Tensor:
    """`[k * k, in, out]` as `[out, in, k, k]`, `[k * k, C]` as `[C, 1, k, k]`.

    The places of a sparse kernel are counted down its columns: `x * k + y` is row `y`, column `x`.
    """
    side = math.isqrt(kernel.shape[0]) if kernel.dim() in (2, 3) else 0
    if not side or side * side != kernel.shape[0]:
        raise WeightsError(
            f"{path} has {name} of shape {list(kernel.shape)}, expected [k * k, in, out] or "
            "[k * k, channels]"
        )
    places = kernel.unflatten(0, (side, side)).transpose(0, 1)  # [rows, columns, ...]
    if kernel.dim() == 2:
        return places.permute(2, 0, 1).unsqueeze(1).contiguous()
    return places.permute(3, 2, 0, 1).contiguous()


def official_network(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of timm's network by their names in SparK's code; only a ConvNeXt has others.

    Linear layers that timm has as convolutions of 1 x 1 become linear again.
    """
    if not is_convnext_of_timm(state):
        return dict(state)
    renamed = {}
    for name, value in state.items():
        official = timm_to_official(name)
        is_linear = "pwconv" in official and value.dim() == 4
        renamed[official] = value.flatten(1) if is_linear else value
    return renamed
