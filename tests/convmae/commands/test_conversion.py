"""`convmae convert`: foreign files in, ours out, and back."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from golden import fill

import convmae
from convmae.config import OptionError
from convmae.models.layers import resample_pos_embed, sincos_pos_embed
from convmae.weights.checkpoint import load_model, open_weights
from convmae.weights.foreign import open_foreign
from convmae.weights.pretrained import (
    classifier_for,
    load_pretrained,
)
from tests.support.foreign_files import encoder_of, official, refused, run, same, save
from tests.support.paths import GOLDEN

if TYPE_CHECKING:
    from torch import Tensor

pytest.importorskip("safetensors")

pytestmark = pytest.mark.thorough(but_every=3)  # a sample of long sweeps
FRESH = {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}


# -- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["convmae_tiny", "convvit_tiny"])
def test_there_and_back_changes_no_bit(tmp_path: Path, name: str) -> None:
    state = official(name)
    ours = run(save(tmp_path / "a.pth", {"model": state}), tmp_path / "ours")
    assert (ours.model, ours.missing, ours.unexpected, ours.left_out) == (name, [], [], [])
    assert ours.output == tmp_path / "ours" / "model.safetensors"
    assert same(dict(load_model(tmp_path / "ours").state_dict()), state)
    run(tmp_path / "ours", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert list(back) == ["model"] and same(back["model"], state)


def test_half_precision_stays(tmp_path: Path) -> None:
    state = {key: value.half() for key, value in official().items()}
    report = run(save(tmp_path / "a.pth", state), tmp_path / "a.safetensors")
    assert "tensors stay in float16" in report.notes
    assert same(open_weights(report.output).state, state)


WRAPPED = {
    "bare": lambda state: state,
    "model": lambda state: {"model": state},
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "state_dict_ema": lambda state: {"state_dict_ema": state},
    "model_ema": lambda state: {"model_ema": state},
    "DistributedDataParallel": lambda state: {
        "model": {f"module.{key}": value for key, value in state.items()}
    },
    "torch.compile": lambda state: {f"module._orig_mod.{k}": value for k, value in state.items()},
}


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_wrappings(tmp_path: Path, wrapped: str) -> None:
    state = official(size=32)
    report = run(save(tmp_path / "a.pth", WRAPPED[wrapped](state)), tmp_path / "a.safetensors")
    assert report.unexpected == [] and report.missing == []
    assert same(open_weights(report.output).state, state)


def test_views_of_one_storage_and_old_files_and_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = official(size=32)
    flat = torch.cat([value.flatten() for value in state.values()])
    parts = flat.split([value.numel() for value in state.values()])
    views = {key: part.view(state[key].shape) for key, part in zip(state, parts)}
    files = [
        save(tmp_path / "views.pth", views),
        save(tmp_path / "old.pt", views, _use_new_zipfile_serialization=False),
        tmp_path / "foreign.bin",
    ]
    save_file(state, files[2])
    for file in files:
        run(file, tmp_path / file.stem)
        assert same(open_weights(tmp_path / file.stem).state, state)


@pytest.mark.parametrize("low_byte", [0x80, 0x50, 0x20])
def test_safetensors_are_known_whatever_their_first_byte(tmp_path: Path, low_byte: int) -> None:
    """It is the length of the header, and may be that of a pickle, of a zip or of a page."""
    from safetensors.torch import save_file

    state, file = official(size=32), tmp_path / "a.bin"
    for pad in range(0, 256, 8):
        save_file(state, file, metadata={"pad": "x" * pad})
        if file.read_bytes()[0] == low_byte:
            break
    assert file.read_bytes()[0] == low_byte
    assert same(open_weights(run(file, tmp_path / "ours").output).state, state)


def test_entries_of_a_file_can_be_chosen(tmp_path: Path) -> None:
    first, second = official(size=32), official(size=32)
    file = save(tmp_path / "a.pth", {"model": first, "model_ema": second})
    report = run(file, tmp_path / "a.safetensors")
    assert "not read: model_ema" in report.checkpoint
    assert same(open_weights(report.output).state, first)
    report = run(file, tmp_path / "b.safetensors", key="model_ema")
    assert same(open_weights(report.output).state, second)
    assert "has no such dictionary; it has model, model_ema" in refused(file, key="teacher")


def test_a_whole_official_checkpoint(tmp_path: Path) -> None:
    """With optimizer, scaler and argparse.Namespace, as the official script writes it."""
    model = convmae.create_model("convmae_tiny", img_size=32, norm_pix_loss=True)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3, 32, 32), 0.5).loss.backward()
    optimizer.step()
    args = argparse.Namespace(norm_pix_loss=True, input_size=32, blr=1.5e-4, resume="", gpu=None)
    whole = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 7,
        "scaler": {"scale": 65536.0, "_growth_tracker": 3},
        "args": args,
    }
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        file = save(tmp_path / "checkpoint-7.pth", whole, **options)
        report = run(file, tmp_path / "a.safetensors", overwrite=True)
        assert "not read: optimizer, epoch, scaler, args" in report.checkpoint
        loaded = load_model(report.output)
        assert loaded.config == model.config  # norm_pix_loss, too
        assert same(dict(loaded.state_dict()), dict(model.state_dict()))
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


# -- which model, what is missing -----------------------------------------------------------------


def test_an_encoder_alone_converts_to_what_finetune_takes(tmp_path: Path) -> None:
    state = encoder_of(official())
    file = save(tmp_path / "convmae_base.pth", {"model": state})
    report = run(file, tmp_path / "ours")
    assert report.model == "convvit_tiny" and report.missing == [] and report.left_out == []
    assert (
        "the file holds an encoder alone, without decoder_*, mask_token, stage1_output_decode.*, "
        "stage2_output_decode.*, head.*; --finetune takes it"
    ) in report.notes
    loaded = load_pretrained(
        convmae.create_model("convvit_tiny", img_size=64), open_foreign(report.output)
    )
    assert set(loaded.missing) == FRESH
    run(report.output, tmp_path / "back.pth")
    assert same(torch.load(tmp_path / "back.pth", weights_only=True)["model"], state)


def test_what_is_missing_is_fresh_only_on_request_and_listed(tmp_path: Path) -> None:
    state = official()
    file = save(tmp_path / "encoder.pth", encoder_of(state))
    report = run(file, tmp_path / "a.safetensors", kind="convmae")
    assert set(report.missing) == state.keys() - encoder_of(state).keys()
    assert "NOT IN THE FILE, freshly initialised: mask_token" in str(report)
    loaded = load_model(report.output)
    assert torch.equal(loaded.patch_embed4.weight, state["patch_embed4.weight"])
    again = run(file, tmp_path / "b.safetensors", kind="convmae")
    assert same(*(open_weights(r.output).state for r in (report, again)))


def test_kind_leaves_the_decoder_out(tmp_path: Path) -> None:
    state = official()
    report = run(save(tmp_path / "a.pth", state), tmp_path / "a.safetensors", kind="convvit")
    assert report.model == "convvit_tiny" and report.missing == []
    assert set(report.left_out) == state.keys() - encoder_of(state).keys()


def test_other_tensors_are_unexpected_and_the_row_of_a_class_token_is_left_out(
    tmp_path: Path,
) -> None:
    state = encoder_of(official())
    position = state["pos_embed"]
    state["cls_token"] = torch.zeros(1, 1, 256)
    state["pos_embed"] = torch.cat([torch.zeros(1, 1, 256), position], dim=1)
    report = run(save(tmp_path / "v2.pth", state), tmp_path / "a.safetensors")
    assert report.unexpected == ["cls_token"]
    assert "pos_embed: the first of 17 rows, of cls_token, is left out" in report.notes
    assert torch.equal(open_weights(report.output).state["pos_embed"], position)


def test_a_file_of_no_known_size_needs_its_heads(tmp_path: Path) -> None:
    options = {
        "embed_dim": (24, 40, 48),
        "depth": (1, 2, 3),
        "num_heads": 3,
        "mlp_ratio": (3, 49 / 40, 2.5),
        "decoder_embed_dim": 32,
        "decoder_num_heads": 2,
        "decoder_depth": 1,
        "in_chans": 2,
    }
    state = official(size=32, **options)
    file = save(tmp_path / "a.pth", state)
    assert "num_heads is needed (or model)" in refused(file)
    assert "decoder_num_heads is needed" in refused(file, num_heads=3)
    heads = {"num_heads": 3, "decoder_num_heads": 2}
    report = run(file, tmp_path / "a.safetensors", **heads, mean=(0.1, 0.2), std=(1.0, 2.0))
    loaded = load_model(report.output)
    assert same(dict(loaded.state_dict()), state)
    assert loaded.config | {"mlp_ratio": 0} == report.config | {"mlp_ratio": 0}
    assert loaded.config["num_heads"] == 3 and loaded.config["decoder_num_heads"] == 2
    assert open_foreign(report.output).ours.pictures == ((0.1, 0.2), (1.0, 2.0))
    assert classifier_for(open_foreign(report.output)) is None
    run(report.output, tmp_path / "again.safetensors")  # ours tells its heads
    assert "mean has 3 numbers, but" in refused(file, **heads, mean=(0,) * 3, std=(1,) * 3)
    told = run(file, tmp_path / "b.safetensors", **heads).notes
    assert any("2 channels, and nothing tells their mean" in note for note in told)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "convmae_base"}, "has embed_dim (256, 384, 768), but"),
        ({"model": "convmae_base"}, "; convmae_tiny fits"),
        ({"model": "convmae_tini"}, "model: there is no model 'convmae_tini'; did you mean"),
        ({"model": "convvit_tiny", "kind": "convmae"}, "kind convmae and model 'convvit_tiny'"),
        ({"kind": "resnet"}, "kind must be one of auto, convmae, convvit"),
        ({"num_heads": 7}, "embed_dim[2] = 256 must be a multiple of num_heads = 7"),
        ({"num_heads": 0}, "num_heads must be a whole number above 0"),
        ({"input_size": 50}, "input_size must be multiples of 16"),
        ({"mean": (0.5,)}, "mean is given without std"),
        ({"key": " "}, "key must not be empty"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    assert message in refused(save(tmp_path / "a.pth", official(size=32)), **options)


# -- sizes of pictures ----------------------------------------------------------------------------


def test_other_picture_sizes(tmp_path: Path) -> None:
    state = official()
    file = save(tmp_path / "a.pth", state)
    report = run(file, tmp_path / "a.safetensors", input_size=(32, 96))
    assert report.reshaped == [
        "pos_embed: 4 x 4 -> 2 x 6 patches (sin-cos)",
        "decoder_pos_embed: 4 x 4 -> 2 x 6 patches (sin-cos)",
    ]
    loaded = load_model(report.output)
    assert loaded.img_size == (32, 96)
    assert torch.equal(loaded.pos_embed.detach(), sincos_pos_embed(256, (2, 6)))
    assert torch.equal(loaded.decoder_pos_embed.detach(), sincos_pos_embed(192, (2, 6)))
    report = run(file, tmp_path / "b.safetensors", input_size=(32, 96), kind="convvit")
    assert report.reshaped == ["pos_embed: 4 x 4 -> 2 x 6 patches (bicubic)"]
    written = open_weights(report.output).state["pos_embed"]
    assert torch.equal(written, resample_pos_embed(state["pos_embed"], (4, 4), (2, 6)))


def test_a_pretraining_file_tells_its_grid_and_a_classifier_must_be_told(tmp_path: Path) -> None:
    file = save(tmp_path / "a.pth", official(size=(32, 128)))  # 16 patches, and no square
    report = run(file, tmp_path / "a.safetensors")
    assert report.config["img_size"] == [32, 128] and report.reshaped == []
    file = save(tmp_path / "b.pth", official("convvit_tiny", size=(32, 96)))
    message = refused(file)
    assert "12 patches, no square" in message and "32 x 96" in message
    assert "12 patches, no square" in refused(file, input_size=64)
    report = run(file, tmp_path / "b.safetensors", input_size=(32, 96))
    assert report.config["img_size"] == [32, 96] and report.reshaped == []


def test_resampling_is_bicubic_and_keeps_rows_and_columns_apart() -> None:
    constant = torch.full((1, 12, 8), 0.7)
    torch.testing.assert_close(
        resample_pos_embed(constant, (3, 4), (5, 9)), torch.full((1, 45, 8), 0.7)
    )
    ramp = torch.arange(8.0).repeat(8).view(1, 64, 1)  # the column of a patch
    wide = resample_pos_embed(ramp, (8, 8), (5, 16)).view(5, 16)
    torch.testing.assert_close(wide, wide[:1].expand(5, 16))
    expected = (torch.arange(16.0) + 0.5) / 2 - 0.5
    torch.testing.assert_close(wide[0, 4:-4], expected[4:-4], rtol=0, atol=0.05)
    assert resample_pos_embed(ramp, (8, 8), (8, 8)) is ramp
    assert resample_pos_embed(ramp.bfloat16(), (8, 8), (2, 2)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"pos_embed must be \[1, 4, D\] for a grid of 2 x 2"):
        resample_pos_embed(ramp, (2, 2), (4, 4))


# -- the recorded numbers of the official code ----------------------------------------------------


def test_golden_loss_through_an_official_file(tmp_path: Path) -> None:
    golden = np.load(GOLDEN / "convmae_base.npz")
    seed = int(golden["seed"])
    state = filled("convmae_base", seed)
    args = argparse.Namespace(norm_pix_loss=bool(golden["norm_pix_loss"]))
    file = save(tmp_path / "official.pth", {"model": state, "args": args})
    model = load_model(run(file, tmp_path / "ours").output)
    images, noise = (torch.from_numpy(f(2, seed=seed)) for f in (fill.images, fill.noise))
    with torch.no_grad():
        loss = model(images, float(golden["mask_ratio"]), noise).loss.item()
    assert loss == pytest.approx(float(golden["loss"]), rel=1e-5)


@pytest.mark.thorough
def test_golden_logits_through_an_official_file(tmp_path: Path) -> None:
    golden = np.load(GOLDEN / "convvit_base.npz")
    seed = int(golden["seed"])
    file = save(tmp_path / "official.pth", {"model": filled("convvit_base", seed)})
    model = load_model(run(file, tmp_path / "ours").output)
    with torch.no_grad():
        logits = model(torch.from_numpy(fill.images(2, seed=seed))).numpy()
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=2e-5)


def filled(name: str, seed: int) -> dict[str, Tensor]:
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in convmae.create_model(name).state_dict().items()}
    return {
        key: sincos_pos_embed(shape[2], (14, 14))
        if "pos_embed" in key
        else torch.from_numpy(fill.recipe(key, shape, seed))
        for key, shape in shapes.items()
    }


# -- outputs --------------------------------------------------------------------------------------


def test_outputs_are_replaced_only_on_request(tmp_path: Path) -> None:
    file = save(tmp_path / "a.pth", official(size=32))
    output = run(file, tmp_path / "ours").output
    before = output.read_bytes()
    other = save(tmp_path / "b.pth", official(size=32))
    with pytest.raises(OptionError, match=r"output: .* exists; overwrite replaces it"):
        run(other, tmp_path / "ours")
    assert output.read_bytes() == before
    run(other, tmp_path / "ours", overwrite=True)
    assert output.read_bytes() != before
    assert [path.name for path in output.parent.iterdir()] == ["model.safetensors"]


def test_outputs_that_cannot_be(tmp_path: Path) -> None:
    file = save(tmp_path / "a.pth", official(size=32))
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    (tmp_path / "x.pth").mkdir()
    for output, message in (
        ("run", "is the folder of a run"),
        ("x.pth", "is a folder, and named like a file"),
        ("x.tflite", "must end in .safetensors, .pth, .pt, .bin, .onnx, or be a folder"),
        ("a.pth/x.safetensors", "cannot be written"),
    ):
        with pytest.raises(OptionError, match=message):
            run(file, tmp_path / output)
    with pytest.raises(OptionError, match="'nowhere.pth' does not exist"):
        run(Path("nowhere.pth"), tmp_path / "y.pth")
    with pytest.raises(OptionError, match="does not exist; expected a run's folder"):
        run(tmp_path / "nowhere", tmp_path / "y.pth")


def test_a_full_disk_leaves_the_output_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = save(tmp_path / "a.pth", official(size=32))
    output = run(file, tmp_path / "ours").output
    before = output.read_bytes()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("convmae.weights.checkpoint.os.fsync", full)
    with pytest.raises(OptionError, match=r"output .* cannot be written: .*No space left"):
        run(file, tmp_path / "ours", overwrite=True)
    assert output.read_bytes() == before
    assert [path.name for path in output.parent.iterdir()] == ["model.safetensors"]
