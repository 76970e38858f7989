"""The numbers of the official segmenter, recorded in float32 on weights and pictures from a seed.

Recorded at commit 4c97b4c of Alpha-VL/ConvMAE, with the heads and losses of mmsegmentation 0.11.0.
Tolerances are those of the recording.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden.dense import fill_dense
from torch import Tensor

import convmae
from tests.support.paths import GOLDEN

DENSE = GOLDEN / "dense"
TINY = {"num_classes": 7, "head_width": 64, "aux_width": 32}


def filled(golden: Any, size: tuple[int, int], faint: bool = False) -> Any:
    """A segmenter with the recorded weights, in evaluation mode."""
    seed, scale = int(golden["seed"]), fill_dense.FAINT if faint else 1.0
    model = convmae.create_model("segment:convvit_tiny", img_size=size, **TINY).eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            value = fill_dense.value(key, tuple(tensor.shape), seed)
            if value is not None:
                value = torch.from_numpy(np.asarray(value))
                tensor.copy_(value * (scale if fill_dense.is_faint(key) else 1.0))
        table = torch.from_numpy(fill_dense.sincos(model.backbone.pos_embed.shape[2], 14, 14))
        table = table.unflatten(1, (14, 14)).permute(0, 3, 1, 2)
        grid = (size[0] // 16, size[1] // 16)
        table = F.interpolate(table, size=grid, mode="bicubic", align_corners=False)
        model.backbone.pos_embed.copy_(scale * table.flatten(2).transpose(1, 2))
    return model


def check(golden: Any, name: str, found: Tensor, share: float) -> None:
    """What was recorded of a tensor: every so manieth value, its norm and its mean."""
    assert list(found.shape) == golden[f"{name}.shape"].tolist()
    steps = tuple(slice(None, None, int(step)) for step in golden[f"{name}.step"])
    atol = share * float(np.abs(golden[name]).max())
    np.testing.assert_allclose(found.numpy()[steps], golden[name], rtol=0, atol=atol, err_msg=name)
    norm, expected = found.double().norm().item(), float(golden[f"{name}.norm"])
    assert norm == pytest.approx(expected, rel=1e-5), name


def check_losses(golden: Any, model: Any, images: Tensor, labels: Tensor) -> Tensor:
    """The sum of both losses, once they are the recorded ones, and so is the accuracy."""
    losses = model.losses(images, labels)
    assert losses.keys() == {"loss_decode", "loss_auxiliary"}
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(float(golden[name]), rel=1e-5), name
    right = (model.predict(images).argmax(1) == labels).sum() / labels.numel()
    assert 100 * right.item() == pytest.approx(float(golden["accuracy_decode"]), abs=1e-5)
    return losses["loss_decode"] + losses["loss_auxiliary"]


@torch.no_grad()
def check_maps(golden: Any, model: Any, images: Tensor) -> None:
    """The maps of the backbone, and the logits of both heads."""
    maps = model.backbone(images)
    for number, found in enumerate(maps):
        check(golden, f"features{number}", found, 2e-5)
    check(golden, "decode_logits", model(images), 2e-5)
    check(golden, "auxiliary_logits", model.auxiliary_head(maps[-2]), 2e-5)
    grid = model.backbone.position_grid
    check(golden, "pos_embed", model.backbone.pos_embed.mT.unflatten(2, grid), 1e-6)


def inputs(golden: Any, size: tuple[int, int], classes: int) -> tuple[Tensor, Tensor]:
    seed = int(golden["seed"])
    images = torch.from_numpy(fill_dense.picture(*size, seed))
    return images, torch.from_numpy(fill_dense.labels(*size, classes, seed))


@pytest.mark.parametrize(
    ("name", "size"),
    [("segmentation_tiny_128", (128, 128)), ("segmentation_tiny_96x160", (96, 160))],
)
def test_maps_logits_losses_and_gradients(name: str, size: tuple[int, int]) -> None:
    golden = np.load(DENSE / f"{name}.npz")
    model = filled(golden, size)
    images, labels = inputs(golden, size, 7)
    check_maps(golden, model, images)
    loss = check_losses(golden, model, images, labels)
    if "grad_names" not in golden:
        return
    loss.backward()
    norms = {
        key: p.grad.double().norm().item()
        for key, p in model.named_parameters()
        if p.grad is not None
    }
    recorded = dict(zip(golden["grad_names"].tolist(), golden["grad_norms"].tolist()))
    assert norms == pytest.approx(recorded, rel=1e-4)


@torch.no_grad()
def test_faint_maps_tell_the_eps_of_norms() -> None:
    """With a residual stream of about 0.03, another eps of a LayerNorm moves a map by 1e-4."""
    golden = np.load(DENSE / "segmentation_tiny_128_faint.npz")
    model = filled(golden, (128, 128), faint=True)
    images, _ = inputs(golden, (128, 128), 7)
    for number, found in enumerate(model.backbone(fill_dense.FAINT * images)):
        check(golden, f"features{number}", found, 1e-5)


def test_the_official_names_and_shapes() -> None:
    recorded = json.loads((DENSE / "keys_segmentation_base_512.json").read_text())
    with torch.device("meta"):
        model = convmae.create_model("segment:convvit_base", num_classes=150)
    own = {key: list(value.shape) for key, value in model.state_dict().items()}
    expected = {
        key: shape
        for key, (shape, _, _) in recorded.items()
        if not key.endswith("relative_position_index")
    }
    assert own == expected
    parameters = {key for key, (_, _, is_parameter) in recorded.items() if is_parameter}
    assert dict(model.named_parameters()).keys() == parameters
    assert model.config["head_width"] == 768 and model.config["aux_width"] == 256
