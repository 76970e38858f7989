"""`convmae convert --output model.onnx`."""

from __future__ import annotations

import importlib.util
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

import convmae
from convmae.commands import onnx_file
from convmae.commands.convert import convert
from convmae.config import ConvertConfig, OptionError
from convmae.data import Statistics
from convmae.models import ConvViT, resample_pos_embed
from convmae.weights.checkpoint import save_weights
from tests.support.foreign_files import official, save
from tests.support.onnx_files import check_plain, run_onnx

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("safetensors")
for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)

CLASSES = ("cat", "dog, wet", "Eichhörnchen")
PICTURES = Statistics((0.1, 0.2, 0.3, 0.4), (1.0, 2.0, 3.0, 4.0))
TOLERANCE = {"rtol": 0, "atol": 2e-5}  # float32, logits of about 1


def to_onnx(checkpoint: Path, output: Path, **options: Any) -> onnx_file.OnnxReport:
    report = convert(ConvertConfig(str(checkpoint), str(output), **options))
    assert isinstance(report, onnx_file.OnnxReport)
    return report


def metadata(path: Path) -> dict[str, Any]:
    values = {p.key: p.value for p in check_plain(path).metadata_props}
    return {k: v if k == "model" else json.loads(v) for k, v in values.items()}


@pytest.fixture
def classifier(tmp_path: Path) -> tuple[Path, ConvViT]:
    """A run's weights, with a head as linear probes have it."""
    model = convmae.create_model(
        "convvit_tiny", img_size=(32, 64), in_chans=4, num_classes=3, head_norm=True
    )
    assert isinstance(model, ConvViT)
    head: Any = model.head
    head[0].running_mean.normal_()
    head[1].weight.data.normal_(std=0.05)
    save_weights(tmp_path / "run", model, "convvit_tiny", pictures=PICTURES, classes=CLASSES)
    return tmp_path / "run", model.eval()


@pytest.mark.thorough
@torch.no_grad()
def test_a_classifier(tmp_path: Path, classifier: tuple[Path, ConvViT]) -> None:
    run, model = classifier
    report = to_onnx(run, tmp_path / "out" / "model.onnx")
    assert report.difference is not None and report.difference < 1e-5
    assert [p.name for p in report.output.parent.iterdir()] == ["model.onnx"]
    assert metadata(report.output) == {
        "model": "convvit_tiny",
        "config": model.config,
        "input_size": [32, 64],
        "mean": list(PICTURES.mean),
        "std": list(PICTURES.std),
        "classes": list(CLASSES),
    }
    proto = check_plain(report.output)
    assert [v.name for v in proto.graph.input] == ["images"]
    assert [v.name for v in proto.graph.output] == ["logits"]
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 20)]
    for batch in (1, 5):
        images = torch.randn(batch, 4, 32, 64)
        (logits,) = run_onnx(report.output, images)
        torch.testing.assert_close(torch.from_numpy(logits), model(images), **TOLERANCE)
    assert "largest difference" in str(report) and "logits [batch, 3]" in str(report)


@torch.no_grad()
@pytest.mark.thorough
def test_another_size_and_other_statistics(
    tmp_path: Path, classifier: tuple[Path, ConvViT]
) -> None:
    run, model = classifier
    report = to_onnx(
        run, tmp_path / "a.onnx", input_size=(48, 32), mean=(0.5,) * 4, std=(0.25,) * 4
    )
    found = metadata(report.output)
    assert found["input_size"] == [48, 32] and found["mean"] == [0.5] * 4
    model.pos_embed = torch.nn.Parameter(resample_pos_embed(model.pos_embed, (2, 4), (3, 2)))
    model.img_size = (48, 32)
    images = torch.randn(2, 4, 48, 32)
    (logits,) = run_onnx(report.output, images)
    torch.testing.assert_close(torch.from_numpy(logits), model(images), **TOLERANCE)
    with pytest.raises(OptionError, match="mean has 3 numbers, but .* is of 4 channels"):
        to_onnx(run, tmp_path / "b.onnx", mean=(0.5,) * 3, std=(0.5,) * 3)


@torch.no_grad()
@pytest.mark.thorough
def test_the_encoder_of_a_foreign_pretraining_model(tmp_path: Path) -> None:
    state = official("convmae_tiny", size=32)
    report = to_onnx(save(tmp_path / "a.pth", {"model": state}), tmp_path / "a.onnx")
    assert any("an encoder alone" in note for note in report.notes)
    model = convmae.create_model(
        "convvit_tiny", img_size=32, num_classes=0, global_pool=False
    ).eval()
    model.load_state_dict({key: state[key] for key in model.state_dict()})
    images = torch.randn(2, 3, 32, 32)
    (features,) = run_onnx(report.output, images)
    assert isinstance(model, ConvViT) and features.shape == (2, 4, 256)
    expected = model.forward_features(images)
    largest = expected.abs().max().item()  # far from what training gives: random weights
    difference = (torch.from_numpy(features) - expected).abs().max().item()
    assert difference <= 1e-4 * largest
    assert [v.name for v in check_plain(report.output).graph.output] == ["features"]


@pytest.mark.thorough
def test_what_cannot_be_written(
    tmp_path: Path, classifier: tuple[Path, ConvViT], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = classifier
    (tmp_path / "there.onnx").write_text("old")
    (tmp_path / "folder.onnx").mkdir()
    nowhere = tmp_path / "nowhere"
    for checkpoint, output, options, message in (
        (run, "there.onnx", {}, r"there.onnx exists; overwrite replaces it"),
        (run, "folder.onnx", {}, "is a folder, and named like a file"),
        (run, "new.onnx", {"kind": "convmae"}, "kind convmae, a pretraining model"),
        (run, "there.onnx/new.onnx", {}, "cannot be written"),
        (nowhere, "new.onnx", {}, "nowhere' does not exist"),
    ):
        with pytest.raises(OptionError, match=message):
            to_onnx(checkpoint, tmp_path / output, **options)
    monkeypatch.setattr(onnx_file, "LARGEST", 1000)
    with pytest.raises(
        OptionError, match=r"one ONNX file holds 2 GiB, but convvit_tiny in float32"
    ):
        to_onnx(run, tmp_path / "new.onnx")
    monkeypatch.undo()
    monkeypatch.setattr(onnx_file, "TOLERANCE", -1.0)
    with pytest.raises(OptionError, match="onnxruntime differs from PyTorch by"):
        to_onnx(run, tmp_path / "there.onnx", overwrite=True)
    assert (tmp_path / "there.onnx").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.onnx", "run", "there.onnx"]


@pytest.mark.thorough
def test_without_the_packages(
    tmp_path: Path, classifier: tuple[Path, ConvViT], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec

    def without(*names: str) -> Any:
        return lambda name: None if name in names else find(name)

    monkeypatch.setattr(onnx_file, "find_spec", without("onnx", "onnxscript"))
    with pytest.raises(OptionError, match=r"needs onnx and onnxscript.*install 'convmae\[onnx\]'"):
        to_onnx(classifier[0], tmp_path / "a.onnx")
    assert not (tmp_path / "a.onnx").exists()
    monkeypatch.setattr(onnx_file, "find_spec", without("onnxruntime"))
    report = to_onnx(classifier[0], tmp_path / "a.onnx")
    assert report.difference is None and "onnxruntime is not installed" in str(report)


@torch.no_grad()
@pytest.mark.thorough
def test_a_segmenter_with_any_batch_and_of_another_size(tmp_path: Path) -> None:
    torch.manual_seed(1)
    sizes = {"embed_dim": (16, 24, 32), "depth": (1, 1, 2), "num_heads": 2}
    options = {"num_classes": 3, "head": "upernet", "head_width": 8, "aux_width": 8} | sizes
    name = "segment:convvit_tiny"
    model: Any = convmae.create_model(name, img_size=64, in_chans=4, **options).eval()
    for parameter in model.parameters():  # relative positions begin at 0
        parameter.normal_(std=0.2)
    save_weights(tmp_path / "run", model, name, pictures=PICTURES, classes=CLASSES)
    torch.save({"meta": {}, "state_dict": model.state_dict(), "optimizer": {}}, tmp_path / "a.pth")
    own = to_onnx(tmp_path / "run", tmp_path / "own.onnx")
    official_one = to_onnx(tmp_path / "a.pth", tmp_path / "a.onnx", input_size=(64, 96))
    assert own.inputs == "images [batch, 4, 64, 64] (float32, normalised)"
    assert own.outputs == "logits [batch, 3, 16, 16]"
    assert official_one.outputs == "logits [batch, 3, 16, 24]"
    told = metadata(own.output)
    assert (told["model"], told["classes"], told["input_size"]) == (name, list(CLASSES), [64, 64])
    assert metadata(official_one.output)["input_size"] == [64, 96]
    for report, size in ((own, (64, 64)), (official_one, (64, 96))):
        assert report.difference is not None and report.difference < 1e-4
        for batch in (1, 3):
            images = torch.randn(batch, 4, *size)
            (logits,) = run_onnx(report.output, images)
            expected = model(images)
            torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)


def test_a_detector_is_refused_with_the_way_out(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    name = "detect:convvit_tiny"
    model = convmae.create_model(name, num_classes=2, img_size=64, width=16, box_features=16)
    save_weights(tmp_path / "run", model, name)
    with pytest.raises(OptionError, match=r"detect:convvit_tiny: .*another length .* docs/export"):
        to_onnx(tmp_path / "run", tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()
