"""Backbones: maps of pictures of any size, names of layers, checkpoints, networks of timm."""

import copy
import pickle
import re

import pytest
import timm
import torch
from torch import nn

from convmae.config import WeightsWarning
from convmae.models import create_model, resample_pos_embed
from convmae.models.dense_tasks import SimpleFeaturePyramid, TimmBackbone, create_backbone
from convmae.models.dense_tasks.convvit_backbones import (
    SegmentationConvViT,
    _last_of_each,
    _spread_from_first,
)
from convmae.models.dense_tasks.positions import relative_position_index, resample_table
from convmae.models.layers import sincos_pos_embed

pytestmark = pytest.mark.thorough(but_every=3)  # a sample of long sweeps

KINDS = ("segmentation", "detection", "vitdet")
SMALL = {"embed_dim": (8, 12, 16), "depth": (1, 1, 3), "num_heads": 2, "mlp_ratio": (2, 2, 2)}


def small(kind, img_size=64, **options):
    """A backbone of few channels, in evaluation, with numbers in all tables."""
    backbone = create_backbone("convvit_tiny", kind, img_size=img_size, **SMALL, **options).eval()
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if "table" in name or "rel_pos_" in name:
                parameter.normal_()
    return backbone


def pyramid():
    return SimpleFeaturePyramid(small("vitdet", window_size=3), width=6).eval()


def every_backbone():
    return [small("segmentation"), small("detection", window_size=3), pyramid()]


@pytest.mark.parametrize("size", [(64, 64), (32, 33), (50, 95)])
def test_maps_of_any_size(size):
    for backbone in every_backbone():
        with torch.no_grad():
            maps = backbone(torch.randn(2, 3, *size))
        expected = [
            (2, channels, *(-(-side // stride) for side in size))
            for channels, stride in zip(backbone.channels, backbone.strides, strict=True)
        ]
        if isinstance(backbone, SegmentationConvViT):  # a convolution of 3 x 3 without padding
            sides = [((max(-(-side // 16), 3)) - 3) // 2 + 1 for side in size]
            limits = [-(-side // 32) for side in size]
            expected[3] = (2, 16, *(min(pair) for pair in zip(sides, limits)))
        assert [tuple(x.shape) for x in maps] == expected


def test_pictures_are_padded_with_zeros_at_the_bottom_and_at_the_right():
    images = torch.randn(1, 3, 50, 70)
    padded = nn.functional.pad(images, (0, 10, 0, 14))
    for backbone in every_backbone():
        with torch.no_grad():
            for x, whole in zip(backbone(images), backbone(padded), strict=True):
                assert torch.equal(x, whole[:, :, : x.shape[2], : x.shape[3]])


def test_a_picture_alone_is_as_in_a_batch():
    images = torch.randn(2, 3, 48, 80)
    for backbone in every_backbone():
        with torch.no_grad():
            for together, alone in zip(backbone(images), backbone(images[1:]), strict=True):
                torch.testing.assert_close(together[1:], alone, rtol=0, atol=1e-5)


def test_maps_are_those_of_the_classifiers_trunk():
    """With tables of zeros and equal epsilons, at 224, where a window of 14 or 16 is the map."""
    classifier = create_model("convvit_tiny").eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        trunk = classifier.forward_intermediates(images, intermediates_only=True)
    norms = {n: m for n, m in classifier.named_modules() if isinstance(m, nn.LayerNorm)}
    for kind in KINDS:
        backbone = create_backbone("convvit_tiny", kind, img_size=224).eval()
        missing, unexpected = backbone.load_state_dict(classifier.state_dict(), strict=False)
        assert set(unexpected) == {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
        assert all(re.search(r"table|rel_pos_|gamma_|^fpn\.", name) for name in missing)
        for name, module in backbone.named_modules():
            if name in norms:
                module.eps = norms[name].eps
        with torch.no_grad():
            maps = backbone(images)
        expected = trunk[2:3] if kind == "vitdet" else trunk[: 4 if kind == "detection" else 3]
        for x, y in zip(maps, expected):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-5 * y.abs().max().item())


def test_which_blocks_see_everything():
    """Those of the published models of 11 blocks; the same rule for others."""
    assert _spread_from_first(11, 4) == [0, 3, 6, 10]
    assert _last_of_each(11, 4) == [1, 4, 7, 10]
    with torch.device("meta"):
        for kind, tiny, large in (
            ("detection", [0, 3], [0, 6, 12, 19]),
            ("vitdet", [1, 3], [4, 9, 14, 19]),
        ):
            for name, expected in (("convvit_tiny", tiny), ("convvit_large", large)):
                blocks = create_backbone(name, kind, img_size=224).blocks3
                assert [i for i, b in enumerate(blocks) if b.window is None] == expected
        chosen = create_backbone("convvit_tiny", "vitdet", img_size=224, global_blocks=[2])
    assert [block.window is None for block in chosen.blocks3] == [False, False, True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_number(kind):
    backbone = small(kind)
    images = torch.randn(1, 3, 64, 48)
    gradients = []
    for checkpointing in (False, True):
        backbone.set_grad_checkpointing(checkpointing)
        backbone.zero_grad()
        sum(x.square().sum() for x in backbone(images)).backward()
        gradients.append(
            {n: p.grad.clone() for n, p in backbone.named_parameters() if p.requires_grad}
        )
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 50
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
        assert gradient.abs().sum() > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_to_bfloat16(kind):
    backbone = small(kind)
    images = torch.randn(1, 3, 64, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = backbone(images)
        sum(x.float().square().mean() for x in maps).backward()
    with torch.no_grad():
        for x, exact in zip(maps, backbone(images), strict=True):
            assert (x.float() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_exported_programs_hold_no_op_of_ours(kind):
    backbone = small(kind)
    images = torch.randn(1, 3, 64, 80)
    with torch.no_grad():
        program = torch.export.export(backbone, (images,))
        assert not [node for node in program.graph.nodes if "convmae" in str(node.target)]
        for x, exact in zip(program.module()(images), backbone(images), strict=True):
            torch.testing.assert_close(x, exact, rtol=0, atol=1e-5)


# -- training -------------------------------------------------------------------------------------


def official_layers(kind, name):
    """Layers of the official optimizers, by another wording of their rules."""
    if re.match(r"(net\.)?blocks3\.\d+\.", name):
        return int(name.split("blocks3.")[1].split(".")[0]) + 1
    if re.match(r"(net\.)?(patch_embed\d|blocks[12])\.", name):
        return 0
    return 0 if name == "pos_embed" and kind != "vitdet" else 12


def test_layers_and_decay_of_the_published_recipes():
    with torch.device("meta"):
        backbones = {kind: create_backbone("convvit_base", kind, img_size=224) for kind in KINDS}
        backbones["pyramid"] = SimpleFeaturePyramid(backbones["vitdet"])
    for kind, backbone in backbones.items():
        layers = backbone.layer_ids()
        assert backbone.num_layers == 13
        assert layers == {
            name: official_layers("vitdet" if kind == "pyramid" else kind, name)
            for name, _ in backbone.named_parameters()
        }
    segmentation = backbones["segmentation"].layer_ids()
    assert sum(layer == 0 for layer in segmentation.values()) == 71
    # 0.8 and 0.75 are the decays of the recipes
    assert 0.8 ** (12 - backbones["vitdet"].layer_ids()["blocks1.0.norm1.bias"]) == pytest.approx(
        0.0687, abs=5e-5
    )
    assert 0.75 ** (12 - segmentation["pos_embed"]) == pytest.approx(0.031676, abs=5e-7)

    undecayed = {kind: backbone.no_weight_decay() for kind, backbone in backbones.items()}
    for kind, backbone in backbones.items():
        assert undecayed[kind] < dict(backbone.named_parameters()).keys()
    for name in ("pos_embed", "blocks3.1.attn.relative_position_bias_table"):
        assert name not in undecayed["segmentation"]
    for name in ("blocks3.1.gamma_1", "blocks3.1.attn.qkv.bias", "fpn.1.weight", "fpn.0.bias"):
        assert name in undecayed["segmentation"]
    table = "windowed_rel_pos_bias.relative_position_bias_table"
    assert {"pos_embed", table, "blocks1.0.norm1.weight"} < undecayed["detection"]
    assert not {"blocks3.1.attn.qkv.bias", "patch_embed1.proj.bias"} & undecayed["detection"]
    assert undecayed["pyramid"] == {f"net.{name}" for name in undecayed["vitdet"]}
    assert {"pos_embed", "blocks3.1.norm2.bias"} < undecayed["vitdet"]
    assert not {"blocks3.1.attn.rel_pos_h", "blocks3.1.mlp.fc1.bias"} & undecayed["vitdet"]


def test_fresh_parameters():
    segmentation, detection, vitdet = (
        create_backbone("convvit_tiny", kind, img_size=64, drop_path_rate=0.3) for kind in KINDS
    )
    for backbone in (segmentation, detection, vitdet):
        zero = [p for n, p in backbone.named_parameters() if "table" in n or "rel_pos_" in n]
        assert zero and not any(p.any() for p in zero)
        rates = [
            b.drop_path.rate for b in (*backbone.blocks1, *backbone.blocks2, *backbone.blocks3)
        ]
        assert rates == pytest.approx([0.3 * i / 7 for i in range(8)])
    weight = segmentation.blocks3[0].mlp.fc1.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.02) and weight.abs().max() > 0.05
    assert bool((segmentation.blocks3[0].gamma_2 == 1).all())
    cut = detection.blocks3[0].mlp.fc1.weight  # at one standard deviation
    assert cut.abs().max() <= 0.02 and cut.std().item() == pytest.approx(0.0108, rel=0.02)
    kernel = detection.blocks1[0].mlp.fc2.weight  # of 256 inputs
    assert kernel.std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert not detection.blocks1[0].mlp.fc2.bias.any()
    assert vitdet.blocks1[0].mlp.fc2.bias.any()  # convolutions as PyTorch has them
    pretrained = sincos_pos_embed(256, (14, 14))
    positions = resample_pos_embed(pretrained, (14, 14), (4, 4), antialias=False)
    assert torch.equal(detection.pos_embed, positions) and not detection.pos_embed.requires_grad
    assert segmentation.pos_embed.requires_grad and segmentation.pos_embed.shape == (1, 16, 256)
    assert vitdet.pos_embed.requires_grad and vitdet.pos_embed.shape == (1, 196, 256)


# -- state dicts ----------------------------------------------------------------------------------


def test_positions_of_other_sizes_are_resampled_when_loaded():
    large, small_one = small("segmentation", 96), small("segmentation", 48)
    state = large.state_dict()
    with pytest.warns(WeightsWarning) as warned:
        small_one.load_state_dict(state)
    table, positions = (str(warning.message) for warning in warned)
    assert re.search(r"\(3 tables, such as blocks3.0.attn.relative_position_bias_table\)", table)
    assert (
        "pos_embed is of pictures of another size: resampled (bicubic), 6 x 6 -> 3 x 3" in positions
    )
    expected = resample_pos_embed(state["pos_embed"], (6, 6), (3, 3), antialias=False)
    assert torch.equal(small_one.pos_embed, expected)
    name = "blocks3.0.attn.relative_position_bias_table"
    expected = resample_table(state[name], (6, 6), (3, 3))
    torch.testing.assert_close(small_one.state_dict()[name], expected)
    images = torch.randn(1, 3, 48, 48)
    with torch.no_grad():  # what the larger one does with a smaller picture
        for x, y in zip(small_one(images), large(images), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-5)

    large, small_one = small("vitdet", 96), small("vitdet", 48)
    with pytest.warns(WeightsWarning, match=r"\(4 tables, such as blocks3.0.attn.rel_pos_h\)"):
        small_one.load_state_dict(large.state_dict())  # its position embedding stays 14 x 14
    with torch.no_grad():
        (x,), (y,) = small_one(images), large(images)
    torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["segmentation", "detection"])
def test_official_index_buffers_are_left_out(kind):
    backbone = small(kind)
    state = dict(backbone.state_dict())
    tables = [n for n in state if n.endswith("relative_position_bias_table")]
    for name in tables:
        index = relative_position_index((4, 4))
        state[name.replace("bias_table", "index")] = index
    assert len(state) > len(backbone.state_dict())
    backbone.load_state_dict(state)
    wrapped = nn.ModuleDict({"backbone": backbone})
    wrapped.load_state_dict({f"backbone.{name}": value for name, value in state.items()})


# -- networks of timm -----------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["timm:resnet18", "timm:convnext_atto"])
def network(request):
    return create_backbone(request.param, "detection", img_size=64).eval()


def test_maps_of_a_network_of_timm(network):
    assert isinstance(network, TimmBackbone)
    assert network.strides == (4, 8, 16, 32)
    own = timm.create_model(network.name.removeprefix("timm:"), num_classes=0).eval()
    assert network.state_dict().keys() == own.state_dict().keys()
    own.load_state_dict(network.state_dict())
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        maps = network(images)
        stages = own.forward_intermediates(images, intermediates_only=True)[-4:]
        odd = network(torch.randn(1, 3, 50, 33))
    for x, y in zip(maps, stages, strict=True):
        assert torch.equal(x, y)
    assert tuple(x.shape[1] for x in maps) == network.channels
    assert [x.shape[2:] for x in odd] == [(13, 9), (7, 5), (4, 3), (2, 2)]


def test_a_network_of_timm_learns(network):
    backbone = copy.deepcopy(network)
    backbone.set_grad_checkpointing(True)
    sum(x.mean() for x in backbone(torch.randn(1, 3, 64, 64))).backward()
    unused = {n for n, p in backbone.named_parameters() if p.grad is None}
    assert unused == {n for n, p in backbone.named_parameters() if not p.requires_grad}
    assert unused == set(backbone.unused_parameters)
    layers = backbone.layer_ids()
    assert layers.keys() == {name for name, _ in backbone.named_parameters()}
    used = [layer for name, layer in layers.items() if name not in unused]
    assert min(used) == 0 and max(used) == backbone.num_layers - 2
    vectors = {name for name, p in backbone.named_parameters() if p.dim() <= 1}
    assert vectors == backbone.no_weight_decay()
    again = pickle.loads(pickle.dumps(backbone))
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert all(torch.equal(x, y) for x, y in zip(again(images), backbone(images)))


# -- errors ---------------------------------------------------------------------------------------


def test_wrong_pictures(network):
    for backbone in (*every_backbone(), network):
        with pytest.raises(ValueError, match=r"images are 31 x 64, expected at least 32 pixels"):
            backbone(torch.randn(1, 3, 31, 64))
        with pytest.raises(ValueError, match=r"images have 4 channels, but the model takes 3"):
            backbone(torch.randn(1, 4, 64, 64))
        with pytest.raises(
            TypeError, match=r"floating tensor of normalised pixels, got torch.uint8"
        ):
            backbone(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("name", "kind", "options", "message"),
    [
        ("convvit_tiny", "segment", {}, "kind must be one of segmentation, detection, vitdet"),
        ("convvit_tini", "vitdet", {}, r"no backbone 'convvit_tini'; did you mean convvit_tiny\?"),
        ("timm:resnet19", "vitdet", {}, "has no network 'resnet19'"),
        ("timm:vit_tiny_patch16_224", "vitdet", {}, "vit_tiny_patch16_224 cannot be a backbone"),
        ("timm:resnet18", "detection", {"window_size": 4}, "has no argument 'window_size'"),
        ("convvit_tiny", "segmentation", {"window_size": 4}, "no argument 'window_size'"),
        ("convvit_tiny", "detection", {"window_size": 0}, "window_size must be a positive whole"),
        ("convvit_tiny", "detection", {"global_blocks": [4]}, r"blocks of stage 3, 0 ... 3, got"),
        ("convvit_tiny", "vitdet", {"img_size": 100}, "img_size must be a positive multiple of 16"),
        ("convvit_tiny", "vitdet", {"num_heads": 5}, r"embed_dim\[2\] = 256 must be a multiple of"),
        ("convvit_tiny", "detection", {"depth": (2, 2)}, "depth must have one value for each"),
    ],
)
def test_wrong_arguments(name, kind, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        create_backbone(name, kind, **({"img_size": 64} | options))


def test_a_pyramid_needs_one_map():
    with pytest.raises(ValueError, match=r"one map of stride 16 \(kind vitdet\), got strides"):
        SimpleFeaturePyramid(small("detection"))
    with pytest.raises(ValueError, match=r"width must be a positive whole number, got 0"):
        SimpleFeaturePyramid(small("vitdet"), width=0)
