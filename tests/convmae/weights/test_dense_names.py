"""Trunks of any origin start segmenters and detectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F

from convmae import WeightsError, create_model
from convmae.data import IMAGENET
from convmae.models.dense_tasks import SimpleFeaturePyramid, create_backbone
from convmae.weights.checkpoint import save_weights
from convmae.weights.dense_names import backbone_of, load_trunk
from convmae.weights.foreign import open_foreign

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

SMALL: dict[str, Any] = {
    "embed_dim": (16, 24, 32),
    "depth": (1, 1, 2),
    "num_heads": 2,
    "mlp_ratio": (2, 2, 2),
}
KINDS = ("segmentation", "detection", "vitdet")
NEW = {  # what pretraining has not
    "segmentation": ("gamma_", "relative_position_bias_table", "fpn."),
    "detection": ("relative_position_bias_table",),
    "vitdet": ("rel_pos_",),
}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ConvMAE at 64 x 96 pixels."""
    torch.manual_seed(1)
    model = create_model("convmae_tiny", img_size=(64, 96), **SMALL)
    folder = tmp_path_factory.mktemp("pretrained")
    save_weights(folder, model, "convmae_tiny", None, IMAGENET)
    return folder


def backbone(kind: str, size: Any = 64, **options: Any) -> Any:
    windows = {} if kind == "segmentation" else {"window_size": 2}
    return create_backbone("convvit_tiny", kind, img_size=size, **(windows | SMALL | options))


def filled(model: Any) -> Any:
    """Every tensor random, so that nothing is right by chance."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape) + (0.5 if name.endswith("var") else -0.5))
    return model.eval()


def official(kind: str, net: Any) -> dict[str, Any]:
    """A file as the official code of that kind writes it, with index buffers and heads."""
    prefix = {"segmentation": "", "detection": "bottom_up.", "vitdet": "net."}[kind]
    state: dict[str, Tensor] = {f"backbone.{prefix}{k}": v for k, v in net.state_dict().items()}
    tables = [name for name in state if name.endswith("relative_position_bias_table")]
    for name in tables:
        state[name.replace("bias_table", "index")] = torch.zeros(4, 4, dtype=torch.int64)
    if kind == "segmentation":
        head = {"decode_head.conv_seg.weight": torch.zeros(3, 4, 1, 1)}
        return {"meta": {"CLASSES": ("a", "b")}, "state_dict": state | head, "optimizer": {}}
    head = {"roi_heads.box_predictor.cls_score.weight": torch.zeros(3, 4)}
    return {"model": state | head, "iteration": 7}


# -- from pretraining -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_pretrained_trunk_is_taken_whole(pretrained: Path, kind: str) -> None:
    net, source = backbone(kind), open_foreign(pretrained).state
    before = {name: value.clone() for name, value in net.state_dict().items()}
    report = load_trunk(net, pretrained)
    own = net.state_dict()
    new = {name for name in own if any(part in name for part in NEW[kind])}
    assert set(report.missing) == new and new
    assert all(torch.equal(own[name], before[name]) for name in new)
    grid = {"segmentation": (4, 4), "detection": (4, 4), "vitdet": (14, 14)}[kind]
    for name in set(own) - new - {"pos_embed"}:
        assert torch.equal(own[name], source[name]), name
    image = source["pos_embed"].reshape(1, 4, 6, -1).permute(0, 3, 1, 2)
    expected = F.interpolate(image, size=grid, mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(own["pos_embed"], expected)
    assert report.resampled == [f"pos_embed: 4 x 6 -> {grid[0]} x {grid[1]} patches"]
    assert {"mask_token", "norm.weight", "decoder_norm.weight"} <= set(report.left_out)
    assert report.statistics == IMAGENET and report.loaded == len(own) - len(new)
    assert "left out: " in str(report)


def test_the_classifiers_features_are_those_of_the_detectors_trunk(tmp_path: Path) -> None:
    """Without windows and positions of its own, a trunk computes what the classifier does."""
    classifier = filled(create_model("convvit_tiny", img_size=64, num_classes=3, **SMALL))
    save_weights(tmp_path, classifier, "convvit_tiny")
    net = backbone("detection", window_size=4).eval()
    report = load_trunk(net, tmp_path)
    assert {"head.weight", "fc_norm.weight"} <= set(report.left_out)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = classifier.forward_intermediates(
            images, indices=[2], intermediates_only=True, norm=False
        )[0]
        torch.testing.assert_close(net(images)[2], expected)


def test_channels_are_adapted(pretrained: Path) -> None:
    net = backbone("segmentation", in_chans=1)
    report = load_trunk(net, pretrained)
    weight = open_foreign(pretrained).state["patch_embed1.proj.weight"]
    torch.testing.assert_close(net.patch_embed1.proj.weight, weight.sum(1, keepdim=True))
    assert "3 -> 1 channels, their sum" in str(report.adapted) and report.statistics is None
    fresh = load_trunk(backbone("vitdet", in_chans=4), pretrained, adapt_input="fresh")
    assert "patch_embed1.proj.weight" in fresh.missing


# -- from segmenters and detectors ----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_official_files_of_the_same_kind_are_read_to_the_bit(tmp_path: Path, kind: str) -> None:
    source, net = filled(backbone(kind)), backbone(kind)
    torch.save(official(kind, source), tmp_path / "official.pth")
    if kind == "vitdet":
        report = load_trunk(SimpleFeaturePyramid(net, 16), tmp_path / "official.pth")
    else:
        report = load_trunk(net, tmp_path / "official.pth")
    for name, value in source.state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name
    assert report.missing == report.resampled == report.unexpected == []
    assert len(report.left_out) == 1 and report.left_out[0].startswith(("decode_", "roi_"))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for one, other in zip(net.eval()(images), source(images), strict=True):
            assert torch.equal(one, other)


def test_other_sizes_are_resampled_as_a_forward_pass_does(tmp_path: Path) -> None:
    """A trunk of 64 pixels, loaded for 96, computes what it computes when it sees 96 itself."""
    for kind in KINDS:
        source, net = filled(backbone(kind, 64)), backbone(kind, 96)
        torch.save(official(kind, source), tmp_path / f"{kind}.pth")
        report = load_trunk(net, tmp_path / f"{kind}.pth")
        assert report.resampled
        images = torch.randn(1, 3, 96, 96)
        with torch.no_grad():
            for one, other in zip(net.eval()(images), source(images), strict=True):
                torch.testing.assert_close(one, other)


def test_our_segmenter_starts_a_detector_and_another_of_rectangles(tmp_path: Path) -> None:
    options = {"num_classes": 3, "head": "light", "img_size": (64, 96)} | SMALL
    segmenter = filled(create_model("segment:convvit_tiny", **options))
    save_weights(tmp_path, segmenter, "segment:convvit_tiny", None, IMAGENET)
    assert backbone_of(open_foreign(tmp_path)) is None  # of no known size
    same, square = backbone("segmentation", (64, 96)), backbone("segmentation", 64)
    load_trunk(same, tmp_path)
    for name, value in segmenter.backbone.state_dict().items():
        assert torch.equal(same.state_dict()[name], value), name
    report = load_trunk(square, tmp_path)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for one, other in zip(square.eval()(images), segmenter.backbone(images), strict=True):
            torch.testing.assert_close(one, other)
    assert "blocks3.0.attn.relative_position_bias_table: 77 -> 49 distances" in report.resampled
    detector = backbone("detection")
    report = load_trunk(detector, tmp_path)
    assert report.notes == ["4 scales of branches are multiplied into the layers before"]
    block = segmenter.backbone.blocks3[1]
    expected = block.gamma_1[:, None] * block.attn.proj.weight
    torch.testing.assert_close(detector.blocks3[1].attn.proj.weight, expected)
    expected = block.gamma_2 * block.mlp.fc2.bias
    torch.testing.assert_close(detector.blocks3[1].mlp.fc2.bias, expected)


# -- refused --------------------------------------------------------------------------------------


def test_other_architectures_are_refused_by_both_names(pretrained: Path, tmp_path: Path) -> None:
    save_weights(tmp_path, create_model("convvit_small", img_size=32), "convvit_small")
    net = create_backbone("convvit_tiny", "segmentation", img_size=64)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(
        WeightsError, match=r"is of convvit_small .*backbone is convvit_tiny .*, or "
    ):
        load_trunk(net, tmp_path)
    with pytest.raises(WeightsError, match=r"is of a ConvViT of embed_dim \(16, 24, 32\).*_tiny"):
        load_trunk(net, pretrained)
    with pytest.raises(WeightsError, match=r"with 2 attention heads, but the backbone has 4"):
        load_trunk(backbone("detection", num_heads=4), pretrained)
    (tmp_path / "empty.pth").write_bytes(b"")
    with pytest.raises(WeightsError, match="is empty"):
        load_trunk(net, tmp_path / "empty.pth")
    torch.save({"model": {"fc.weight": torch.zeros(2, 2)}}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"is of 1 tensors: fc.weight, but .* convvit_tiny"):
        load_trunk(net, tmp_path / "other.pth")
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert backbone_of(open_foreign(tmp_path / "model.safetensors")) == "convvit_small"


def test_a_file_that_lacks_a_part_or_holds_nan_is_refused(tmp_path: Path) -> None:
    source = filled(backbone("detection"))
    data = official("detection", source)
    broken = dict(data["model"])
    del broken["backbone.bottom_up.blocks3.1.norm2.bias"]
    torch.save({"model": broken}, tmp_path / "part.pth")
    with pytest.raises(WeightsError, match=r"lacks blocks3.1.norm2.bias, which a ConvViT of"):
        load_trunk(backbone("detection"), tmp_path / "part.pth")
    data["model"]["backbone.bottom_up.blocks1.0.norm1.bias"][0] = float("nan")
    torch.save(data, tmp_path / "nan.pth")
    with pytest.raises(WeightsError, match=r"NaN or infinity in blocks1.0.norm1.bias"):
        load_trunk(backbone("detection"), tmp_path / "nan.pth")


# -- networks of timm -----------------------------------------------------------------------------


def test_networks_of_timm_start_from_their_own_kind(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    source = timm.create_model("resnet18", num_classes=5)
    torch.save(source.state_dict(), tmp_path / "timm.pth")
    net = create_backbone("timm:resnet18", "detection", img_size=64)
    report = load_trunk(net, tmp_path / "timm.pth")
    assert torch.equal(net.state_dict()["layer4.1.conv2.weight"], source.layer4[1].conv2.weight)
    assert report.left_out == ["fc.weight", "fc.bias"]
    options = {"num_classes": 2, "img_size": 64, "head": "light"}
    segmenter = create_model("segment:timm:resnet18", **options)
    save_weights(tmp_path / "segmenter", segmenter, "segment:timm:resnet18")
    found = open_foreign(tmp_path / "segmenter")
    assert backbone_of(found) == "timm:resnet18"
    load_trunk(net, found)
    assert torch.equal(net.state_dict()["conv1.weight"], segmenter.backbone.conv1.weight)
    other = create_backbone("timm:resnet26", "detection", img_size=64)
    with pytest.raises(WeightsError, match=r"is of timm:resnet18, but the model is timm:resnet26"):
        load_trunk(other, found)
    with pytest.raises(WeightsError, match=r"is of timm:resnet18, but the backbone is a ConvViT"):
        load_trunk(backbone("vitdet"), found)
