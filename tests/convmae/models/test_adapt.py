"""Weights of other pictures: other numbers of channels, other sizes, through PyTorch and timm."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch

import convmae
from convmae.config import WeightsError, WeightsWarning
from convmae.models import ConvMAE, ConvViT, resample_pos_embed
from convmae.models.adapt import adapt_input, adapt_output, factors, sincos_grid
from convmae.models.layers import sincos_pos_embed
from convmae.weights import checkpoint as checkpoints
from tests.support.foreign_files import encoder_of

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

timm = pytest.importorskip("timm")
pytest.importorskip("safetensors")
convmae.register_timm()

SIZES: dict[str, Any] = {"embed_dim": (8, 12, 16), "depth": (1, 1, 2), "num_heads": 2}
DECODER = {"decoder_embed_dim": 12, "decoder_depth": 1, "decoder_num_heads": 3}
TINY_HEAD = ["head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"]


def classifier(**options: Any) -> ConvViT:
    return moved(ConvViT(**{"img_size": 64, "num_classes": 5} | SIZES | options))  # type: ignore[arg-type]


def pretrained(**options: Any) -> ConvMAE:
    return moved(ConvMAE(**{"img_size": 64} | SIZES | DECODER | options))  # type: ignore[arg-type]


def moved(model: Any) -> Any:
    """Off its initial values where they are learnt, in eval mode."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def other(folder: Path, model: nn.Module, **options: Any) -> Any:
    """`load_model` of the weights of a model, for other pictures."""
    name = "convvit_tiny" if isinstance(model, ConvViT) else "convmae_tiny"
    checkpoints.save_weights(folder, model, name)  # type: ignore[arg-type]
    return convmae.load_model(folder, **options)


# -- channels -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "how"), [(1, "auto"), (1, "sum"), (5, "sum"), (3, "sum")])
def test_sum_keeps_the_features_of_grey_pictures(tmp_path: Path, channels: int, how: str) -> None:
    model, grey = classifier(), torch.randn(2, 1, 64, 64)
    expected = model.forward_features(grey.expand(-1, 3, -1, -1))
    if channels == 3:  # nothing to adapt: the weights as they are
        found = other(tmp_path, model, in_chans=3, adapt_input=how)
    else:
        with pytest.warns(WeightsWarning, match=rf"patch_embed1: 3 -> {channels} channels, .*sum"):
            found = other(tmp_path, model, in_chans=channels, adapt_input=how)
    assert found.in_chans == channels == found.config["in_chans"]
    features = found.forward_features(grey.expand(-1, channels, -1, -1))
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("times", [2, 3])
def test_repeat_keeps_the_features_of_repeated_pictures(tmp_path: Path, times: int) -> None:
    model, images = classifier(), torch.randn(2, 3, 64, 64)
    with pytest.warns(WeightsWarning, match=rf"3 -> {3 * times} channels, repeated, times 3 / "):
        found = other(tmp_path, model, in_chans=3 * times)
    features = found.forward_features(images.repeat(1, times, 1, 1))
    torch.testing.assert_close(features, model.forward_features(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_it_is_what_timm_does(channels: int) -> None:
    from timm.models import adapt_input_conv

    weight = torch.randn(6, 3, 4, 4)
    found = adapt_input(weight, channels)
    torch.testing.assert_close(found, adapt_input_conv(channels, weight.clone()))
    half = adapt_input(weight.half(), channels)
    assert half.dtype == torch.float16 and half.is_contiguous()


def test_a_decoder_predicts_as_many_channels(tmp_path: Path) -> None:
    """Grey: the mean of what it predicted; repeated: the same again."""
    model, grey = pretrained(), torch.randn(2, 1, 64, 64)
    noise = torch.rand(2, 16)
    with pytest.warns(WeightsWarning, match=r"decoder_pred likewise"):
        found = other(tmp_path, model, in_chans=1)
    before = model(grey.expand(-1, 3, -1, -1), noise=noise, return_pred=True).pred
    pred = found(grey, noise=noise, return_pred=True).pred
    assert pred.shape == (2, 16, 256)
    mean = before.unflatten(2, (256, 3)).mean(3)
    torch.testing.assert_close(pred, mean, rtol=1e-4, atol=1e-4)
    images = torch.randn(2, 3, 64, 64)
    with pytest.warns(WeightsWarning):
        found = other(tmp_path, model, in_chans=6)
    before = model(images, noise=noise, return_pred=True).pred.unflatten(2, (256, 3))
    pred = found(images.repeat(1, 2, 1, 1), noise=noise, return_pred=True).pred
    torch.testing.assert_close(
        pred.unflatten(2, (256, 6)), before.repeat(1, 1, 1, 2), rtol=1e-4, atol=1e-4
    )
    assert adapt_output(torch.randn(512, 7, dtype=torch.bfloat16), 2, 3).dtype == torch.bfloat16


def test_fresh_is_fresh_and_the_rest_is_not(tmp_path: Path) -> None:
    model = pretrained()
    with pytest.warns(WeightsWarning, match="patch_embed1: 3 -> 2 channels, fresh"):
        found = other(tmp_path, model, in_chans=2, adapt_input="fresh")
    own, before = found.state_dict(), model.state_dict()
    drawn = {"patch_embed1.proj.weight", "decoder_pred.weight"}
    shared = [k for k in own if k.partition(".proj")[0] != "patch_embed1" and "_pred" not in k]
    assert all(torch.equal(own[key], before[key]) for key in shared) and len(shared) > 40
    assert all(0 < own[key].std() < 1 for key in drawn)
    with pytest.raises(ValueError, match="adapt_input must be one of auto, sum, repeat, fresh"):
        other(tmp_path, model, in_chans=3, adapt_input="mean")


# -- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 96), 128, (16, 256)])
def test_load_state_dict_fits_a_classifier(size: Any) -> None:
    """As `set_input_size` and the command line do, and as bicubic resampling is."""
    model = classifier()
    bigger = classifier(img_size=size)
    state = model.state_dict()
    if bigger.num_patches == model.num_patches:  # a trained embedding does not tell its grid
        bigger.load_state_dict(state)
        assert torch.equal(bigger.pos_embed, model.pos_embed)
        return
    with pytest.warns(WeightsWarning, match=r"pos_embed .* resampled \(bicubic\), 4 x 4 -> "):
        bigger.load_state_dict(state)
    assert torch.equal(bigger.pos_embed, resample_pos_embed(model.pos_embed, (4, 4), bigger.grid))
    assert bigger.pos_embed.requires_grad and state["pos_embed"].shape[1] == 16
    model.set_input_size(size)
    images = torch.randn(1, 3, *model.img_size)
    assert torch.equal(model(images), bigger(images))


@pytest.mark.parametrize("size", [(32, 96), 128, (16, 256)])
def test_load_state_dict_fits_a_pretraining_model(size: Any) -> None:
    """Sin-cos embeddings are those of the new grid, even where it has as many patches."""
    model, bigger = pretrained(), pretrained(img_size=size)
    expected = {k: v.clone() for k, v in bigger.state_dict().items() if k.endswith("pos_embed")}
    with pytest.warns(WeightsWarning, match=r"resampled \(sin-cos\), 4 x 4 -> ") as said:
        bigger.load_state_dict(model.state_dict())
    assert len(said) == 2
    for name, value in bigger.state_dict().items():
        assert torch.equal(value, expected.get(name, model.state_dict()[name])), name


def test_strict_is_strict() -> None:
    model = classifier()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(model.state_dict())  # nothing to say
    state = dict(classifier(img_size=128).state_dict())
    del state["blocks1.0.norm1.weight"]
    with pytest.warns(WeightsWarning), pytest.raises(RuntimeError, match="blocks1.0.norm1.weight"):
        model.load_state_dict(state)
    with pytest.warns(WeightsWarning):
        missing, unexpected = model.load_state_dict({**state, "x": state["pos_embed"]}, False)
    assert (missing, unexpected) == (["blocks1.0.norm1.weight"], ["x"])
    oblong = classifier(img_size=(32, 96)).state_dict()
    with pytest.raises(RuntimeError, match=r"is of 12 patches, no square, .*convmae.load_model\("):
        model.load_state_dict(oblong)
    with pytest.raises(RuntimeError, match=r"(?s)Missing .*fc_norm.weight.*Unexpected.*mask_token"):
        model.load_state_dict(pretrained().state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for patch_embed1.proj.weight"):
        model.load_state_dict(classifier(in_chans=1).state_dict())


def test_load_model_knows_the_grid_of_its_file(tmp_path: Path) -> None:
    model = classifier(img_size=(32, 96))
    found = other(tmp_path, model, img_size=64)
    assert torch.equal(found.pos_embed, resample_pos_embed(model.pos_embed, (2, 6), (4, 4)))
    assert found.config["img_size"] == [64, 64]
    model = pretrained(img_size=(32, 128))
    found = other(tmp_path, model, img_size=(64, 64))
    assert torch.equal(found.pos_embed, sincos_pos_embed(16, (4, 4)))
    assert torch.equal(found.decoder_pos_embed, sincos_pos_embed(12, (4, 4)))
    with pytest.raises(ValueError, match="img_size must be a positive multiple of 16"):
        convmae.load_model(tmp_path, img_size=40)


def test_grids() -> None:
    assert factors(12) == [(1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1)]
    assert factors(16) == [(1, 16), (2, 8), (4, 4), (8, 2), (16, 1)] and factors(1) == [(1, 1)]
    for grid in [*factors(12), *factors(64), (1, 1), (720, 2), (2, 720)]:
        for width in (4, 16):
            assert sincos_grid(sincos_pos_embed(width, grid)) == grid
            assert sincos_grid(sincos_pos_embed(width, grid).bfloat16()) == grid
    nearly = sincos_pos_embed(16, (3, 4))
    nearly[0, 7, 3] += 0.1
    assert sincos_grid(nearly) is None
    for strange in (torch.randn(1, 12, 16), torch.full((1, 12, 16), torch.nan)):
        assert sincos_grid(strange) is None
    assert sincos_grid(sincos_pos_embed(16, (3, 4))[:, :11]) is None
    assert sincos_grid(sincos_pos_embed(16, (3, 4)).flip(1)) is None


def test_dynamic_img_size(tmp_path: Path) -> None:
    model = classifier(dynamic_img_size=True)
    fixed = ConvViT(**{k: v for k, v in model.config.items() if k != "dynamic_img_size"}).eval()
    fixed.load_state_dict(model.state_dict())
    same = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(same), fixed(same))
    for size in ((32, 96), (80, 64)):
        images = torch.randn(2, 3, *size)
        fixed.set_input_size(size)
        assert torch.equal(model(images), fixed(images))
        for x, y in zip(*(m.forward_intermediates(images)[1] for m in (model, fixed)), strict=True):
            assert torch.equal(x, y)
        fixed.set_input_size(64)
        fixed.load_state_dict(model.state_dict())
    model(torch.randn(1, 3, 96, 96)).sum().backward()
    assert model.pos_embed.grad is not None and model.pos_embed.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"images are 40 x 64, expected multiples of 16 \(dynamic"):
        model(torch.randn(1, 3, 40, 64))
    with pytest.raises(ValueError, match=r"images are 32 x 32, but the model takes 64 x 64"):
        fixed(torch.randn(1, 3, 32, 32))
    again = other(tmp_path, model)
    assert again.dynamic_img_size and again.config == model.config
    assert "dynamic_img_size" not in fixed.config  # as files had it before there was the option
    through = timm.create_model("convvit_tiny", img_size=64, dynamic_img_size=True)
    assert through(torch.randn(1, 3, 32, 48)).shape == (1, 1000)


# -- timm -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A run's folder with a checkpoint of a pretraining, and its state dict."""
    folder = tmp_path_factory.mktemp("run")
    model = convmae.create_model("convmae_tiny", img_size=64)
    state = {"step": 1}
    checkpoints.save_checkpoint(folder, model, "convmae_tiny", state)
    return folder, model.state_dict()


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "encoder alone"])
def test_the_encoder_of_a_checkpoint_through_timm(
    run: tuple[Path, dict[str, Tensor]], tmp_path: Path, suffix: str
) -> None:
    folder, state = run
    path = folder / "checkpoint" / "model.safetensors"
    if suffix != "safetensors":
        path = tmp_path / "official.pth"
        kept = encoder_of(state) if suffix == "encoder alone" else state
        torch.save({"model": kept}, path)
    with pytest.warns(WeightsWarning, match="the encoder is taken.*fresh: head.weight") as said:
        model = timm.create_model("convvit_tiny", checkpoint_path=str(path), img_size=64)
    own = model.state_dict()
    assert len(said) == 1 and all(name in str(said[0].message) for name in TINY_HEAD)
    assert all(torch.equal(own[key], state[key]) for key in own if key not in TINY_HEAD)
    with pytest.warns(WeightsWarning) as said:
        model = timm.create_model(
            "convvit_tiny", checkpoint_path=str(path), img_size=(32, 96), in_chans=1
        )
    words = " ".join(str(entry.message) for entry in said)
    assert "3 -> 1 channels, their sum" in words and "4 x 4 -> 2 x 6 patches" in words
    first = state["patch_embed1.proj.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(model.patch_embed1.proj.weight.data, first)
    position = resample_pos_embed(state["pos_embed"], (4, 4), (2, 6))
    assert torch.equal(model.pos_embed, position)


def test_paths_as_files_of_timm(run: tuple[Path, dict[str, Tensor]]) -> None:
    """A run's folder, a file in it; with features_only as well; with the digest checked."""
    folder, state = run
    for path in (folder, folder / "checkpoint", folder / "checkpoint" / "model.safetensors"):
        overlay = {"file": str(path)}
        options = {"pretrained": True, "pretrained_cfg_overlay": overlay, "img_size": 64}
        with pytest.warns(WeightsWarning, match=r"tensors from .*fresh: head \(2 tensors\), fc_n"):
            model = timm.create_model("convvit_tiny", num_classes=7, **options)
        own = model.state_dict()
        assert all(torch.equal(own[key], state[key]) for key in own if key not in TINY_HEAD)
    with pytest.warns(WeightsWarning, match=r"is not read: timm does so with pretrained=True only"):
        timm.create_model("convvit_tiny", pretrained_cfg_overlay=overlay)
    with pytest.warns(WeightsWarning, match="3 -> 4 channels, repeated"):
        net = timm.create_model(
            "convvit_tiny", features_only=True, in_chans=4, out_indices=(2,), **options
        )
    first = net.model.patch_embed1.proj.weight
    torch.testing.assert_close(first.data, adapt_input(state["patch_embed1.proj.weight"], 4))
    (maps,) = net(torch.randn(1, 4, 64, 64))
    assert maps.shape == (1, 256, 4, 4)
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:-1000] + bytes([whole[-1000] ^ 1]) + whole[-999:])
        with pytest.raises(WeightsError, match="is damaged"):
            timm.create_model("convvit_tiny", **options)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (0,)])
def test_features_only_with_a_checkpoint_path(
    run: tuple[Path, dict[str, Tensor]], tmp_path: Path, indices: tuple[int, ...]
) -> None:
    folder, state = run
    path = folder / "checkpoint" / "model.safetensors"
    options = {"features_only": True, "out_indices": indices, "img_size": 64}
    with pytest.warns(WeightsWarning, match="of a pretraining model: the encoder is taken"):
        net = timm.create_model("convvit_tiny", checkpoint_path=str(path), **options)
    own = net.model.state_dict()
    kept = [key for key in own if "fc_norm" not in key]
    assert all(torch.equal(own[key], state[key]) for key in kept) and len(kept) > 10
    part = {k: v for k, v in state.items() if k != "blocks1.0.norm1.weight"}
    torch.save(part, tmp_path / "part.pth")
    with pytest.warns(WeightsWarning), pytest.raises(RuntimeError, match=r"blocks1.0.norm1.weight"):
        timm.create_model("convvit_tiny", checkpoint_path=str(tmp_path / "part.pth"), **options)
    classifier = convmae.create_model("convvit_tiny", img_size=64, num_classes=5)
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    with pytest.warns(WeightsWarning, match=r"features_only: \d+ tensors that its maps do not ne"):
        net = timm.create_model(
            "convvit_tiny", checkpoint_path=str(tmp_path / "classifier.pth"), **options
        )
    own, expected = net.model.state_dict(), classifier.state_dict()
    assert all(torch.equal(own[key], expected[key]) for key in own)


def test_nothing_is_silently_missing_through_timm(
    run: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    state = {k: v for k, v in run[1].items() if k != "blocks3.1.attn.qkv.weight"}
    torch.save(state, tmp_path / "part.pth")
    path = str(tmp_path / "part.pth")
    with pytest.warns(WeightsWarning), pytest.raises(RuntimeError, match=r"blocks3.1.attn.qkv"):
        timm.create_model("convvit_tiny", checkpoint_path=path, img_size=64)
    overlay = {"file": path}
    with pytest.raises(WeightsError, match=r"lacks blocks3.1.attn.qkv.weight, which"):
        timm.create_model(
            "convvit_tiny", pretrained=True, pretrained_cfg_overlay=overlay, img_size=64
        )
    model = timm.create_model("convvit_tiny", img_size=64)
    missing, unexpected = model.load_state_dict(run[1], strict=False)
    assert set(missing) == set(TINY_HEAD) and "mask_token" in unexpected
