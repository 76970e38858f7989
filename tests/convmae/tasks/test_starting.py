"""Training from given weights: `--init`, `--finetune`, other channels; and painting with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import convmae
from convmae import OptionError, ReconstructConfig, WeightsError, load_pretrained, pretrain
from convmae.models import resample_pos_embed
from convmae.models.adapt import adapt_input
from convmae.models.layers import sincos_pos_embed
from convmae.weights import checkpoint as checkpoints
from convmae.weights.checkpoint import open_weights
from tests.support.foreign_files import encoder_of, official, save
from tests.support.paths import FASHION
from tests.support.training_runs import DEVICE, folder_of, options, same, tensors

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

pytest.importorskip("safetensors")
ENCODER = ("pos_embed", "patch_embed", "blocks")
FUSION = {f"stage{i}_output_decode.{kind}" for i in (1, 2) for kind in ("weight", "bias")}


def model(**overrides: Any) -> Any:
    return convmae.create_model("convmae_tiny", **{"img_size": 64, **overrides})


def unchanged(after: dict[str, Tensor], before: dict[str, Tensor], names: set[str]) -> bool:
    return all(torch.equal(after[name], before[name]) for name in names)


def encoder_names(state: dict[str, Tensor]) -> set[str]:
    return {name for name in state if name.startswith(ENCODER)}


# -- what goes into a pretraining model -----------------------------------------------------------


@pytest.mark.parametrize("wrapped", ["bare", "model", "fastconvmae"])
def test_a_whole_pretraining_file(tmp_path: Path, wrapped: str) -> None:
    state = official()
    file = save(tmp_path / "a.pth", {"model": state} if wrapped == "model" else state)
    name = "fastconvmae_tiny" if wrapped == "fastconvmae" else "convmae_tiny"
    target = convmae.create_model(name, img_size=64)
    report = load_pretrained(target, file)
    assert (report.missing, report.left_out, report.notes) == ([], [], [])
    assert same(dict(target.state_dict()), state)
    assert not target.pos_embed.requires_grad


def test_an_encoder_alone_leaves_the_decoder_fresh(tmp_path: Path) -> None:
    """What the released file of the official code holds."""
    state = encoder_of(official())
    target = model()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    report = load_pretrained(target, save(tmp_path / "a.pth", {"model": state}))
    after = dict(target.state_dict())
    assert unchanged(after, state, state.keys() & after.keys())
    fresh = before.keys() - state.keys()
    assert unchanged(after, before, fresh) and set(report.missing) == fresh
    assert fresh > FUSION and "decoder_blocks.0.norm1.weight" in fresh
    assert "not in it, so fresh: mask_token" in str(report)


@pytest.mark.parametrize("pool", [True, False])
def test_a_finetuned_classifier_gives_its_encoder(tmp_path: Path, pool: bool) -> None:
    state = official("convvit_tiny", global_pool=pool, num_classes=5)
    classifier = convmae.create_model("convvit_tiny", img_size=64, global_pool=pool, num_classes=5)
    classifier.load_state_dict(state)
    file = checkpoints.save_weights(tmp_path, classifier, "convvit_tiny")
    target = model()
    report = load_pretrained(target, file)
    names = encoder_names(state) | (set() if pool else {"norm.weight", "norm.bias"})
    assert unchanged(dict(target.state_dict()), state, names) and len(names) > 90
    left = {"head.weight", "head.bias"} | ({"fc_norm.weight", "fc_norm.bias"} if pool else set())
    assert set(report.left_out) == left
    assert {"mask_token", "decoder_pos_embed", *FUSION} < set(report.missing)


def test_a_file_as_timm_writes_it(tmp_path: Path) -> None:
    state = official("convvit_tiny")
    wrapped = {f"model.{name}": value for name, value in state.items()}
    file = save(tmp_path / "a.pth.tar", {"state_dict": wrapped, "epoch": 3, "arch": "convvit_tiny"})
    target = model()
    load_pretrained(target, file)
    assert unchanged(dict(target.state_dict()), state, encoder_names(state))


def test_other_sizes_and_channels(tmp_path: Path) -> None:
    state = official()
    file = save(tmp_path / "a.pth", state)
    target = model(img_size=(32, 96), in_chans=1)
    report = load_pretrained(target, file)
    assert torch.equal(target.pos_embed, sincos_pos_embed(256, (2, 6)))
    assert torch.equal(target.decoder_pos_embed, sincos_pos_embed(192, (2, 6)))
    first = adapt_input(state["patch_embed1.proj.weight"], 1)
    assert torch.equal(target.patch_embed1.proj.weight, first)
    last = state["decoder_pred.weight"].view(256, 3, -1).mean(1)
    torch.testing.assert_close(target.decoder_pred.weight.data, last)
    assert report.missing == [] and len(report.resampled) == 2
    lines = "\n".join(report.lines())
    assert "note: " in lines and "patch_embed1: 3 -> 1 channels, their sum (decoder_pred" in lines
    trained = official("convvit_tiny")  # whose position embedding was trained
    target = model(img_size=(32, 96))
    load_pretrained(target, save(tmp_path / "b.pth", trained))
    position = resample_pos_embed(trained["pos_embed"], (4, 4), (2, 6))
    assert torch.equal(target.pos_embed, position) and not target.pos_embed.requires_grad


def test_a_decoder_of_another_size_is_fresh_as_a_whole(tmp_path: Path) -> None:
    state = official()
    for overrides in ({"decoder_depth": 3}, {"decoder_embed_dim": 96, "decoder_num_heads": 6}):
        target = model(**overrides)
        before = {k: v.clone() for k, v in target.state_dict().items()}
        report = load_pretrained(target, save(tmp_path / "a.pth", state))
        decoder = {k for k in before if k.startswith(("decoder_", "mask_token"))}
        assert set(report.missing) == decoder and unchanged(target.state_dict(), before, decoder)
        assert unchanged(target.state_dict(), state, FUSION)
        assert "the decoder of" in report.notes[0] and "not of the model's size" in report.notes[0]


def test_a_decoder_of_other_targets_is_told(tmp_path: Path) -> None:
    source = model(norm_pix_loss=True)
    file = checkpoints.save_weights(tmp_path, source, "convmae_tiny")
    report = load_pretrained(model(), file)
    assert report.notes == [f"the decoder of {file} was trained with norm_pix_loss True, not False"]
    assert load_pretrained(model(norm_pix_loss=True), file).notes == []


def test_what_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    target = model()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    state = official()
    small = save(tmp_path / "small.pth", official("convmae_small"))
    part = {k: v for k, v in state.items() if not k.startswith("blocks2.1.conv1")}
    broken = state | {"blocks1.0.conv1.weight": state["blocks1.0.conv1.weight"] * float("nan")}
    decoder = {k: v for k, v in state.items() if not k.startswith(ENCODER)}
    for value, expected in (
        (part, r"lacks blocks2.1.conv1.weight, blocks2.1.conv1.bias, which the model needs"),
        (broken, r"holds NaN or infinity in blocks1.0.conv1.weight; nothing was loaded"),
        (decoder, r"is not of a ConvMAE: it has no patch_embed1.proj.weight"),
        ({"layer1.weight": torch.ones(3)}, r"is not of a ConvMAE"),
    ):
        with pytest.raises(WeightsError, match=expected):
            load_pretrained(target, save(tmp_path / "a.pth", value))
    with pytest.raises(WeightsError, match=r"convmae_small fits"):
        load_pretrained(target, small)
    with pytest.raises(WeightsError, match="does not exist"):
        load_pretrained(target, tmp_path / "nowhere.pth")
    assert same(dict(target.state_dict()), before)


# -- runs -----------------------------------------------------------------------------------------


def test_a_run_starts_from_weights_and_says_so(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a learning rate of nearly 0 the weights of the run are those of the file."""
    state = official(size=32)
    file = save(tmp_path / "a.pth", {"model": encoder_of(state)})
    still = {"lr": 1e-12, "warmup_epochs": 0, "sched": "constant", "weight_decay": 0.0}
    config = options(pictures, tmp_path / "run", init=str(file), epochs=1, **still)
    pretrain(config)
    said = capsys.readouterr().out
    assert f"tensors from {file}; not in it, so fresh: mask_token, decoder_pos_embed" in said
    assert "pos_embed: 2 x 2 -> 2 x 3 patches" in said
    found = tensors(tmp_path / "run")
    for name in encoder_names(state) - {"pos_embed"}:
        torch.testing.assert_close(found[name], state[name], rtol=0, atol=1e-9)
    # From the same weights again, now as a run of our own: the same numbers.
    pretrain(options(pictures, tmp_path / "next", init=str(tmp_path / "run"), epochs=1, **still))
    assert "not in it, so fresh" not in capsys.readouterr().out
    for name, value in tensors(tmp_path / "next").items():
        torch.testing.assert_close(value, found[name], rtol=0, atol=1e-9)


@pytest.mark.thorough
def test_a_run_that_goes_on_does_not_read_its_init(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Statistics stay those that it began with, though the file is gone."""
    numbers = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    pretrain(options(pictures, tmp_path / "first", epochs=1, **numbers))
    begun: dict[str, Any] = {"init": str(tmp_path / "first"), "warmup_epochs": 0}
    pretrain(options(pictures, tmp_path / "a", epochs=1, **begun))
    pretrain(options(pictures, tmp_path / "b", epochs=2, **begun))
    assert open_weights(tmp_path / "a").statistics == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    (tmp_path / "first").rename(tmp_path / "gone")
    capsys.readouterr()
    pretrain(options(pictures, tmp_path / "a", epochs=2, resume="auto", **begun))
    said = capsys.readouterr().out
    assert f"note: --init '{tmp_path / 'first'}' is not read: the run goes on from" in said
    assert open_weights(tmp_path / "a").statistics == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    with pytest.raises(OptionError, match=r"^init '.*first' does not exist"):
        pretrain(options(pictures, tmp_path / "c", resume="auto", **begun))
    assert not (tmp_path / "c").exists()


@pytest.mark.thorough
def test_colour_weights_for_grey_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = model(img_size=32)
    pictures = checkpoints.IMAGENET
    file = checkpoints.save_weights(tmp_path / "rgb", source, "convmae_tiny", pictures=pictures)
    short: dict[str, Any] = {
        "data_path": str(FASHION),
        "input_size": 32,
        "batch_size": 20,
        "max_samples": 40,
        "epochs": 1,
        "warmup_epochs": 0,
        "num_workers": 0,
        "device": DEVICE,
    }
    pretrain(
        convmae.PretrainConfig(
            model="convmae_tiny", output_dir=str(tmp_path / "a"), init=str(file), **short
        )
    )
    said = capsys.readouterr().out
    assert f"note: {file}: patch_embed1: 3 -> 1 channels, their sum (decoder_pred likewise)" in said
    assert f"mean and deviation of {file} are of 3 channels: not used" in said
    assert len(open_weights(tmp_path / "a").statistics.mean) == 1
    for command, kind in (
        (convmae.finetune, convmae.FinetuneConfig),
        (convmae.linprobe, convmae.LinprobeConfig),
    ):
        folder = tmp_path / kind.__name__
        command(kind(finetune=str(file), output_dir=str(folder), adapt_input="repeat", **short))
        assert "patch_embed1: 3 -> 1 channels, repeated, times 3 / 1" in capsys.readouterr().out
        assert open_weights(folder).config["in_chans"] == 1
    frozen = tensors(tmp_path / "LinprobeConfig")["patch_embed1.proj.weight"]
    first = source.patch_embed1.proj.weight.detach()
    torch.testing.assert_close(frozen, 3 * first[:, :1])
    for kind, option in ((convmae.PretrainConfig, "init"), (convmae.FinetuneConfig, "finetune")):
        with pytest.raises(OptionError, match=f"adapt_input sum has no effect without {option}"):
            kind(adapt_input="sum").validate()
    with pytest.raises(OptionError, match="adapt_input must be one of auto, sum, repeat, fresh"):
        convmae.PretrainConfig(adapt_input="mean", init="x").validate()


# -- painting with foreign weights ----------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "data", 2, size=64)


def paint(checkpoint: Path, folder: Path, output: str, **changes: Any) -> np.ndarray:
    from PIL import Image

    path = checkpoint.parent / output
    convmae.reconstruct(
        ReconstructConfig(str(checkpoint), (str(folder),), str(path), device=DEVICE, **changes)
    )
    return np.asarray(Image.open(path))


def test_an_official_file_paints_as_its_conversion_does(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import argparse

    state = official()
    plain = save(tmp_path / "plain.pth", {"model": state})
    told = save(
        tmp_path / "told.pth", {"model": state, "args": argparse.Namespace(norm_pix_loss=True)}
    )
    picture = paint(plain, folder, "plain.png")
    said = capsys.readouterr().out
    assert "does not tell whether it predicts normalised patches: taken as no" in said
    assert "no mean and deviation of its pictures: ImageNet's are used" in said
    for file, norm in ((plain, None), (told, True)):
        ours = tmp_path / f"{file.stem}.safetensors"
        convmae.convert(convmae.ConvertConfig(str(file), str(ours), norm_pix_loss=norm))
    assert np.array_equal(picture, paint(tmp_path / "plain.safetensors", folder, "b.png"))
    normed = paint(tmp_path / "told.safetensors", folder, "c.png")
    capsys.readouterr()
    assert np.array_equal(normed, paint(told, folder, "d.png"))
    assert "normalised patches" not in capsys.readouterr().out  # the file tells
    assert np.array_equal(normed, paint(plain, folder, "e.png", norm_pix_loss=True))
    assert not np.array_equal(normed, picture)
    with pytest.raises(
        OptionError, match=r"norm_pix_loss False contradicts .*told.pth, which says"
    ):
        paint(told, folder, "e.png", norm_pix_loss=False)
    other = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    found = paint(plain, folder, "f.png", **other)
    assert not np.array_equal(found, picture)
    assert np.array_equal(found, paint(tmp_path / "plain.safetensors", folder, "g.png", **other))


def test_weights_that_cannot_paint(tmp_path: Path, folder: Path) -> None:
    state = official()
    part = {k: v for k, v in state.items() if k != "decoder_blocks.1.norm1.bias"}
    for value, expected in (
        (encoder_of(state), r"has no decoder \(no decoder_\*, mask_token\*, .*pretrain --init"),
        (official("convvit_tiny"), r"has no decoder"),
        (part, r"lacks decoder_blocks.1.norm1.bias of its decoder"),
    ):
        with pytest.raises(OptionError, match=expected):
            paint(save(tmp_path / "a.pth", value), folder, "out.png")
    odd = official(embed_dim=(32, 32, 64), num_heads=2)
    with pytest.raises(OptionError, match=r"num_heads is needed.*an option of `convmae convert`"):
        paint(save(tmp_path / "odd.pth", odd), folder, "out.png")
    file = checkpoints.save_weights(tmp_path / "ours", model(), "convmae_tiny")
    with pytest.raises(OptionError, match=r"norm_pix_loss True contradicts .* which says False"):
        paint(file, folder, "out.png", norm_pix_loss=True)
    with pytest.raises(OptionError, match=r"mean has 1 numbers, but .* is of 3 channels"):
        paint(file, folder, "out.png", mean=(0.5,), std=(0.5,))
    assert not list(tmp_path.glob("*.png"))
