"""Files of pretrained convolutional networks as their official codes write them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import convmae

pytest.importorskip("timm")

SPARK = "sparse_encoder.sp_cnn."


def filled(name: str, **options: Any) -> Any:
    """A model with random numbers everywhere, buffers too."""
    model = convmae.create_model(name, **options)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) + 0.5)
            else:
                value.fill_(7)
    return model


def spark_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A SparK model's state dict by the official names, whose ConvNeXt differs from timm's."""
    renamed = {}
    for key, value in state.items():
        name = key
        if "stem.0.weight" in {k.removeprefix(SPARK) for k in state} and key.startswith(SPARK):
            if ".head." in key:
                continue
            name = convnext_name(key.removeprefix(SPARK))
            name = SPARK + name
        renamed[name] = value
    return renamed


def convnext_name(own: str) -> str:
    """The official name of a tensor of timm's ConvNeXt (V2)."""
    own = re.sub(r"^stem\.(\d)", r"downsample_layers.0.\1", own)
    own = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", own)
    own = re.sub(r"^stages\.(\d)\.blocks\.", r"stages.\1.", own)
    own = own.replace("mlp.grn.weight", "grn.gamma").replace("mlp.grn.bias", "grn.beta")
    own = own.replace("mlp.fc", "pwconv").replace("conv_dw", "dwconv")
    return own.replace("head.fc", "head").replace("head.norm", "norm")


def spark_checkpoint(model: Any, arch: str, size: int = 64) -> dict[str, Any]:
    """What SparK's code saves while it pretrains."""
    nan = torch.full((1, 3, size, size), float("nan"))
    module: dict[str, Any] = spark_names(model.state_dict())
    module |= {"imn_m": nan[:, :, :1, :1], "imn_s": nan[:, :, :1, :1], "norm_black": nan}
    module["config"] = {
        "mask_ratio": 0.75,
        "densify_norm_str": "bn",
        "sbn": True,
        "hierarchy": 4,
        "sparse_encoder.input_size": size,
        "dense_decoder.width": model.config["decoder_width"],
    }
    return {
        "args": "Namespace(model='x')",
        "input_size": size,
        "arch": arch,
        "epoch": 3,
        "performance_desc": "",
        "module": module,
        "optimizer": {"state": {}, "param_groups": []},
        "is_pretrain": True,
    }


def minkowski(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An FCMAE's state dict as the code with sparse convolutions has it."""
    sparse = {}
    for key, value in state.items():
        if not key.startswith("encoder."):
            sparse[key] = value
            continue
        if ".head." in key:
            continue
        name = "encoder." + convnext_name(key.removeprefix("encoder."))
        is_stem = "downsample_layers.0." in name
        if name.endswith(".weight") and value.dim() == 4 and not is_stem:
            # Place x * k + y of a kernel is row y, column x.
            places = [
                value[:, :, y, x].T for x in range(value.shape[3]) for y in range(len(value[0, 0]))
            ]
            kernel = torch.stack(places)  # [k * k, in, out]
            depthwise = kernel.shape[1] == 1 and kernel.shape[2] > 1
            sparse[name.removesuffix("weight") + "kernel"] = kernel[:, 0] if depthwise else kernel
            continue
        if "dwconv.bias" in name or re.search(r"downsample_layers\.[123]\.1\.bias", name):
            value = value[None]
        if "grn." in name:
            value = value[None]
        name = re.sub(r"(stages\.\d\.\d+\.norm)\.", r"\1.ln.", name)
        name = re.sub(r"(downsample_layers\.[123]\.0)\.", r"\1.ln.", name)
        name = re.sub(r"(pwconv[12])\.", r"\1.linear.", name)
        sparse[name] = value
    return sparse
