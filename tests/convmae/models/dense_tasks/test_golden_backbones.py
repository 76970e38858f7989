"""Maps of the official backbones, recorded in float32; the keys of their state dicts.

Recorded from Alpha-VL/ConvMAE at 4c97b4c and OpenGVLab/Official-ConvMAE-Det at cd634d3. Where the
sum that blocks add to is faint, another epsilon of a norm shows: it moves a map by 3e-4 at least.
"""

import json

import numpy as np
import pytest
import torch
from golden.dense import fill_dense

from convmae.models.dense_tasks import SimpleFeaturePyramid, create_backbone
from convmae.models.layers import resample_pos_embed, sincos_pos_embed
from tests.support.paths import GOLDEN

DENSE = GOLDEN / "dense"
FEATURES = [f"features{i}" for i in range(4)]
STAGES = [f"s{i}" for i in range(4)]
PYRAMID = [f"p{i}" for i in range(2, 7)]


def segmentation(img_size):
    return lambda: create_backbone("convvit_tiny", "segmentation", img_size=img_size)


def detection():
    return create_backbone("convvit_base", "detection", img_size=256, window_size=4)


def vitdet():
    return create_backbone("convvit_tiny", "vitdet", img_size=256, window_size=5)


def fill_parameters(backbone, prefix, seed, factor):
    """As the recording did; `factor` multiplies what writes to the sum of the blocks."""
    with torch.no_grad():
        for name, tensor in backbone.state_dict().items():
            if name.endswith("pos_embed"):
                positions = sincos_pos_embed(tensor.shape[2], (14, 14))
                grid = getattr(backbone, "position_grid", (14, 14))
                positions = resample_pos_embed(positions, (14, 14), grid, antialias=False)
                tensor.copy_(positions * factor)
                continue
            values = fill_dense.value(prefix + name, tuple(tensor.shape), seed)
            if values is not None:
                faint = factor if fill_dense.is_faint(prefix + name) else np.float32(1)
                tensor.copy_(torch.from_numpy(values * faint))


CASES = {
    "segmentation_tiny_128": (segmentation(128), "backbone.", FEATURES, (128, 128)),
    "segmentation_tiny_128_faint": (segmentation(128), "backbone.", FEATURES, (128, 128)),
    "segmentation_tiny_96x160": (segmentation((96, 160)), "backbone.", FEATURES, (96, 160)),
    "convvitdet_base_256_window4_faint": (detection, "backbone.bottom_up.", STAGES, (256, 256)),
    "vitdet_tiny_160x224": (lambda: SimpleFeaturePyramid(vitdet(), 64), "", PYRAMID, (160, 224)),
    "vitdet_tiny_160x224_faint": (vitdet, "net.", ["last_feat"], (160, 224)),
}


@pytest.mark.parametrize("file", CASES)
def test_maps(file):
    make, prefix, names, size = CASES[file]
    golden = np.load(DENSE / f"{file}.npz")
    seed, faint = int(golden["seed"]), file.endswith("_faint")
    factor = np.float32(fill_dense.FAINT if faint else 1)
    with torch.device("meta"):  # nothing is drawn that is filled
        backbone = make().eval()
    backbone.to_empty(device="cpu")
    fill_parameters(backbone, prefix, seed, factor)
    with torch.no_grad():
        maps = backbone(torch.from_numpy(fill_dense.picture(*size, seed) * factor))
    assert len(maps) == len(names)
    for name, x, channels in zip(names, maps, backbone.channels, strict=True):
        assert x.shape == tuple(golden[f"{name}.shape"]) and x.shape[1] == channels
        _, c, h, w = golden[f"{name}.step"]
        atol = (1e-5 if faint else 2e-5) * np.abs(golden[name]).max()
        np.testing.assert_allclose(x[:, ::c, ::h, ::w], golden[name], rtol=0, atol=atol)
        norm = x.double().norm().item()
        assert norm == pytest.approx(float(golden[f"{name}.norm"]), rel=1e-5)


KEYS = {
    "keys_segmentation_base_512": ("segmentation", {"img_size": 512}, "backbone."),
    "keys_convvitdet_base_mask_rcnn_1024": (
        *("detection", {"img_size": 1024}, "backbone.bottom_up."),
    ),
    "keys_vitdet_base_mask_rcnn": ("vitdet", {"img_size": 1024}, "backbone."),
}


@pytest.mark.parametrize("file", KEYS)
def test_official_keys(file):
    """Names and shapes are the official ones, but for buffers that follow from the shapes."""
    kind, options, prefix = KEYS[file]
    with torch.device("meta"):
        backbone = create_backbone("convvit_base", kind, **options)
        backbone = SimpleFeaturePyramid(backbone) if kind == "vitdet" else backbone
    official = {
        name.removeprefix(prefix): (tuple(shape), is_parameter)
        for name, (shape, _, is_parameter) in json.loads(
            (DENSE / f"{file}.json").read_text()
        ).items()
        if name.startswith(prefix) and not name.endswith("relative_position_index")
    }
    parameters = dict(backbone.named_parameters())
    ours = {name: (tuple(x.shape), name in parameters) for name, x in backbone.state_dict().items()}
    assert ours == official
