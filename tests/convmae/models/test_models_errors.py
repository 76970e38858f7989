"""Bad input to the models: every error names what was found and what was expected."""

import math

import pytest
import torch

import convmae
import convmae_kernels as ck
from convmae.models import ConvMAE, ConvViT

ENCODER = {"embed_dim": (8, 12, 16), "depth": (2, 2, 2), "num_heads": 2, "mlp_ratio": (4, 4, 4)}
DECODER = {"decoder_embed_dim": 24, "decoder_depth": 2, "decoder_num_heads": 3}


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"img_size": 100}, ValueError, "img_size must be a positive multiple of 16.*got 100"),
        ({"img_size": (32, 32, 3)}, ValueError, r"img_size.*\(height, width\).*got \(32, 32, 3\)"),
        ({"in_chans": 0}, ValueError, "in_chans must be a positive whole number, got 0"),
        ({"embed_dim": (8, 16)}, ValueError, r"embed_dim.*3 stages, got \(8, 16\)"),
        ({"depth": (1, 0, 1)}, ValueError, "depth must be a positive whole number, got 0"),
        ({"num_heads": 3}, ValueError, r"embed_dim\[2\] = 16 must be a multiple of num_heads = 3"),
        ({"decoder_num_heads": 5}, ValueError, "decoder_embed_dim = 24.*decoder_num_heads = 5"),
        ({"decoder_embed_dim": 18}, ValueError, "multiple of 4, got 18"),
    ],
)
def test_bad_architectures(changes, error, match):
    with pytest.raises(error, match=match):
        ConvMAE(**{**ENCODER, **DECODER, **changes})


@pytest.mark.parametrize(
    ("name", "changes", "error", "match"),
    [
        ("convmae_bse", {}, ValueError, "no model 'convmae_bse'; did you mean.*convmae_base"),
        ("xyz", {}, ValueError, "no model 'xyz'; there are convmae_tiny, "),
        ("convmae_tiny", {"norm_pix": True}, TypeError, "'norm_pix'; did you mean norm_pix_loss"),
        ("convvit_tiny", {"mask_ratio": 0.5}, TypeError, "'mask_ratio'.*It takes img_size"),
        ("convvit_tiny", {"num_classes": -1}, ValueError, "num_classes must be 0 or.*got -1"),
        ("convvit_tiny", {"drop_path_rate": 1.0}, ValueError, r"drop_path_rate.*\[0, 1\), got 1.0"),
    ],
)
def test_bad_names_and_overrides(name, changes, error, match):
    with pytest.raises(error, match=match):
        convmae.create_model(name, **changes)


FITTING = torch.zeros(2, 3, 32, 64)


def model_for(images):
    return ConvMAE(**ENCODER, **DECODER, img_size=images.shape[2:], in_chans=images.shape[1])


@pytest.mark.parametrize(
    ("images", "error", "match"),
    [
        ([[0.0]], TypeError, "images must be a tensor, got list"),
        (FITTING.byte(), TypeError, "images must be a floating tensor.*got torch.uint8"),
        (FITTING.half(), TypeError, "images are torch.float16, but the model is torch.float32"),
        (FITTING.double(), TypeError, "images are torch.float64, but the model is torch.float32"),
        (FITTING[0], ValueError, r"images must be \[N, C, H, W\], got 3 dimensions: \[3, 32, 64\]"),
        (FITTING[:0], ValueError, "at least one image"),
        (FITTING[:, :1], ValueError, "images have 1 channels, but the model takes 3"),
        (FITTING.mT, ValueError, "images are 64 x 32, but the model takes 32 x 64"),
        (FITTING.to("meta"), ValueError, "images are on meta, but the model is on cpu"),
    ],
)
def test_bad_images(images, error, match):
    model = model_for(FITTING)
    mask = ck.BlockMask.random(2, model.grid, 0.5)
    for call in (
        lambda: model(images),
        lambda: model.forward_encoder(images, mask),
        lambda: model.reconstruct(images),
        lambda: model.patchify(images),
        lambda: ConvViT(**ENCODER, img_size=(32, 64))(images),
    ):
        with pytest.raises(error, match=match):
            call()


def blank(batch, gh, gw):
    return torch.zeros(batch, gh, gw, dtype=torch.bool)


ONE_EMPTY = blank(2, 2, 4)
ONE_EMPTY[0, 0, 0] = True


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"mask_ratio": 1.0}, ValueError, r"mask_ratio must be in \[0, 1\), got 1.0"),
        ({"mask_ratio": -0.1}, ValueError, r"mask_ratio must be in \[0, 1\), got -0.1"),
        ({"mask_ratio": math.nan}, ValueError, r"mask_ratio must be in \[0, 1\), got nan"),
        ({"mask_ratio": 0.9}, ValueError, "at least one visible block in every image.*0 of 8"),
        ({"noise": torch.rand(2, 9)}, ValueError, r"noise must be \[2, 8\].*got \[2, 9\]"),
        ({"noise": torch.rand(3, 8)}, ValueError, r"noise must be \[2, 8\].*got \[3, 8\]"),
        ({"noise": torch.ones(2, 8).int()}, TypeError, "noise must be a floating.*int32"),
        ({"noise": [0.5]}, TypeError, "noise must be a floating tensor, got list"),
        (
            {"noise": torch.rand(2, 8), "mask": ck.BlockMask.full(2, (2, 4))},
            ValueError,
            "noise and mask are both given",
        ),
        ({"mask": ~blank(2, 2, 4)}, TypeError, "mask must be a .*BlockMask, got Tensor"),
        (
            {"mask": ck.BlockMask.full(2, (4, 2))},
            ValueError,
            "mask has a grid of 4 x 2 blocks, but images of 32 x 64 have 2 x 4 patches",
        ),
        (
            {"mask": ck.BlockMask.full(3, (2, 4))},
            ValueError,
            "mask is for a batch of 3, but images has 2",
        ),
        (
            {"mask": ck.BlockMask.full(2, (2, 4), "meta")},
            ValueError,
            "mask is on meta, but images are on cpu",
        ),
        (
            {"noise": torch.rand(2, 8, device="meta")},
            ValueError,
            "is on meta, but images are on cpu",
        ),
        (
            {"mask": ck.BlockMask.from_visible(blank(2, 2, 4))},
            ValueError,
            "at least one visible block in every image",
        ),
        (
            {"mask": ck.BlockMask.from_visible(ONE_EMPTY)},
            ValueError,
            "at least one visible block in every image",
        ),
    ],
)
def test_bad_masks(arguments, error, match):
    model = model_for(FITTING)
    for call in (model, model.reconstruct):
        with pytest.raises(error, match=match):
            call(FITTING, **arguments)


def test_bad_patches():
    with pytest.raises(ValueError, match=r"patches must be \[N, 8, 768\], got \[2, 8, 700\]"):
        model_for(FITTING).unpatchify(torch.zeros(2, 8, 700))
