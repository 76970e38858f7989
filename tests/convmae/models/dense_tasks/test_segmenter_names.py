"""Segmenters by name: backbones of ours and of timm, checkpoints, exported programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

import convmae
from convmae.weights.checkpoint import save_weights
from tests.support.onnx_files import check_plain, export_onnx, run_onnx

if TYPE_CHECKING:
    from pathlib import Path

SMALL: dict[str, Any] = {
    "num_classes": 4,
    "img_size": (128, 96),  # whose coarsest map is of 3 x 2 positions
    "embed_dim": (8, 12, 16),
    "depth": (1, 1, 2),
    "num_heads": 2,
    "head_width": 12,
    "aux_width": 6,
}


def small(name: str = "segment:convvit_tiny", **options: Any) -> convmae.Segmenter:
    """A segmenter off its initial values, with scales and tables of positions that are not 0."""
    given = {**SMALL, **options}
    if "timm:" in name:
        given = {k: v for k, v in given.items() if k not in ("embed_dim", "depth", "num_heads")}
    model = convmae.create_model(name, **given)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def labels_like(images: Tensor) -> Tensor:
    return torch.randint(0, SMALL["num_classes"], (len(images), *images.shape[2:]))


# -- names and checkpoints ------------------------------------------------------------------------


def test_names() -> None:
    assert convmae.full_name("segment:convvit_base_patch16") == "segment:convvit_base"
    assert convmae.list_models("segment:*base") == ["segment:convvit_base"]
    with pytest.raises(ValueError, match="there is no backbone 'convmae_tiny'"):
        convmae.create_model("segment:convmae_tiny", num_classes=3)
    with pytest.raises(TypeError, match="segment:convvit_tiny has no argument 'heads'; did you me"):
        convmae.create_segmenter("convvit_tiny", 3, heads="light")
    with pytest.raises(TypeError, match="segment:timm:resnet18 has no argument 'depth'"):
        convmae.create_segmenter("timm:resnet18", 3, depth=(1, 1, 1))


def test_networks_of_timm_are_listed() -> None:
    pytest.importorskip("timm")
    assert "segment:timm:resnet18" in convmae.list_models("segment:timm:resnet1*")


@pytest.mark.parametrize("name", ["segment:convvit_tiny", "segment:timm:resnet18"])
@pytest.mark.parametrize("options", [{"head": "light"}, {"loss": "ce+dice", "in_chans": 1}])
def test_a_checkpoint_gives_the_model_again(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    if "timm" in name:
        pytest.importorskip("timm")
    weights = [1.0, 2.0, 0.5, 1.0]
    model = small(name, class_weights=weights, **options)
    save_weights(tmp_path, model, name)
    loaded = convmae.load_model(tmp_path)
    assert type(loaded) is convmae.Segmenter
    assert loaded.config == model.config and loaded.img_size == (128, 96)
    images = torch.randn(2, model.in_chans, 128, 96)
    labels = labels_like(images)
    torch.testing.assert_close(loaded(images, labels), model(images, labels), rtol=0, atol=0)


def test_other_commands_and_other_pictures_are_refused(tmp_path: Path) -> None:
    save_weights(tmp_path, small(), "segment:convvit_tiny", pictures=convmae.data.IMAGENET)
    for options in ({"img_size": 64}, {"in_chans": 1}):
        with pytest.raises(ValueError, match="segment:convvit_tiny: it takes pictures of any size"):
            convmae.load_model(tmp_path, **options)
    config = convmae.PredictConfig(str(tmp_path), str(tmp_path))
    with pytest.raises(convmae.OptionError, match="`convmae segment predict` and"):
        convmae.predict(config)


# -- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["segment:convvit_tiny", "segment:timm:resnet18"])
def test_a_step_reaches_every_parameter(name: str) -> None:
    """With activations computed again, on a picture whose sides 16 does not divide."""
    if "timm" in name:
        pytest.importorskip("timm")
    model = small(name).train()
    images = torch.randn(2, 3, 70, 101)
    labels = labels_like(images)
    gradients = []
    for again in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(again)
        torch.manual_seed(0)
        sum(model(images, labels).values()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(g is not None and g.abs().sum() > 0 for g in gradients[0].values())
    torch.testing.assert_close(gradients[0], gradients[1])
    assert model.layer_ids().keys() == gradients[0].keys()


def test_layers_of_the_official_recipe() -> None:
    """13 layers: the 11 blocks of stage 3, what is before them, and what is behind them."""
    with torch.device("meta"):
        model = convmae.create_segmenter("convvit_base", 150, img_size=32)
    ids = model.layer_ids()
    assert model.num_layers == 13 and set(ids.values()) == set(range(13))
    assert sum(i == 0 for i in ids.values()) == 71
    assert ids["backbone.blocks3.0.attn.relative_position_bias_table"] == 1
    last = {name.split(".")[0] for name, i in ids.items() if i == 12}
    assert last == {"backbone", "decode_head", "auxiliary_head"}  # of the backbone its `fpn`
    undecayed = model.no_weight_decay()
    assert undecayed == {name for name, p in model.named_parameters() if p.dim() <= 1}


@pytest.mark.thorough
def test_compiled_blocks_train_as_uncompiled_ones() -> None:
    """One picture, whose coarsest map is of 1 x 1: a BatchNorm has a single value for a channel."""
    images = torch.randn(1, 3, 64, 64)
    labels = labels_like(images)
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = small(dropout=0.0).train()
        if compiled:
            model.compile_blocks(backend="eager")
            parts = [m for m in model.modules() if m._compiled_call_impl is not None]
            kinds = {type(part).__name__ for part in parts}
            assert kinds == {"PatchEmbed", "ConvBlock", "MapBlock", "ConvNorm"}
        losses.append(model(images, labels))
    torch.testing.assert_close(losses[0], losses[1])


# -- exported programs ----------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["upernet", "light"])
@torch.no_grad()
def test_an_exported_program_serves_every_batch(head: str) -> None:
    model = small(head=head)
    images = torch.randn(3, 3, 128, 96)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: batch},))
    for some in (images, images[:1]):
        torch.testing.assert_close(program.module()(some), model(some))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets and not [target for target in targets if "convmae" in target]


@torch.no_grad()
@pytest.mark.thorough
def test_an_onnx_file_serves_every_batch(tmp_path: Path) -> None:
    model, images = small(), torch.randn(3, 3, 128, 96)
    path = export_onnx(model, images[:2], tmp_path / "model.onnx")
    check_plain(path)
    for some in (images, images[:1]):
        (logits,), expected = run_onnx(path, some), model(some)
        difference = (torch.from_numpy(logits) - expected).abs().max()
        assert difference < 1e-5 * expected.abs().max()
