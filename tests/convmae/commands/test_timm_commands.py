"""predict, embed and convert to ONNX, of networks of timm."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import convmae
from convmae import (
    EmbedConfig,
    EvaluateConfig,
    OptionError,
    PredictConfig,
    embed,
    evaluate,
    predict,
)
from convmae.commands.convert import convert
from convmae.config import ConvertConfig
from convmae.data import Statistics
from convmae.data.classes import ClassNames
from convmae.weights.checkpoint import open_weights, save_weights
from tests.support.training_runs import DEVICE, folder_of

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

NAME = "timm:test_convnext"
PICTURES = Statistics((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
CLASSES = ClassNames(["ant", "bee", "cat"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5 pictures of 64 x 64, the size of the models: nothing is resized where all is cut."""
    return folder_of(tmp_path_factory.mktemp("data") / "pictures", 5, 64)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A classifier and the runs that may have come before it."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("weights")
    made: dict[str, Any] = {
        "classifier": convmae.create_model(NAME, img_size=64, num_classes=3),
        "spark": convmae.create_model(NAME, method="spark", img_size=64, decoder_width=32),
        "fcmae": convmae.create_model(NAME, method="fcmae", img_size=64, decoder_width=32),
    }
    return {
        kind: save_weights(
            root / kind, model, NAME, None, PICTURES, CLASSES if kind == "classifier" else None
        )
        for kind, model in made.items()
    }


def normalised(folder: Path) -> torch.Tensor:
    from PIL import Image

    arrays = [np.asarray(Image.open(file)) for file in sorted(folder.iterdir())]
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in PICTURES)
    return (images - mean) / std


def plain(file: Path, num_classes: int = 0, prefix: str = "") -> Any:
    """timm's own network with the weights of a file."""
    state = {
        key.removeprefix(prefix): value
        for key, value in open_weights(file).state.items()
        if key.startswith(prefix)
    }
    model = timm.create_model("test_convnext", num_classes=num_classes).eval()
    model.load_state_dict(state)
    return model


def shared(file: Path, folder: Path, output: Path | None) -> dict[str, Any]:
    return {
        "checkpoint": str(file),
        "data_path": str(folder),
        "output": None if output is None else str(output),
        "crop_pct": 1.0,
        "num_workers": 0,
        "amp": "float32",
        "device": DEVICE,
    }


def embedding(file: Path, folder: Path, output: Path, **options: Any) -> torch.Tensor:
    embed(EmbedConfig(**shared(file, folder, output), overwrite=True, **options))
    return torch.from_numpy(np.load(output)["features"])


@torch.no_grad()
def test_predictions_are_timms(tmp_path: Path, files: dict[str, Path], folder: Path) -> None:
    output = tmp_path / "p.jsonl"
    predict(PredictConfig(**shared(files["classifier"], folder, output), scores="logits"))
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    logits = plain(files["classifier"], 3)(normalised(folder))
    written = torch.tensor([[row[f"logit:{name}"] for name in CLASSES] for row in rows])
    torch.testing.assert_close(written, logits, rtol=1e-4, atol=1e-5)
    assert [row["prediction"] for row in rows] == [CLASSES[i] for i in logits.argmax(1).tolist()]


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "prefix"),
    [("classifier", ""), ("spark", "sparse_encoder.sp_cnn."), ("fcmae", "encoder.")],
)
@pytest.mark.thorough(but_every=5)
def test_features_are_timms(
    tmp_path: Path, files: dict[str, Path], folder: Path, kind: str, prefix: str
) -> None:
    network, images = (
        plain(files[kind], 3 if kind == "classifier" else 0, prefix),
        normalised(folder),
    )
    last, output = network.forward_features(images), tmp_path / "e.npz"
    pooled = network.forward_head(last, pre_logits=True)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(embedding(files[kind], folder, output), pooled, **close)
    if kind == "fcmae":
        return
    found = embedding(files[kind], folder, output, features="map")
    torch.testing.assert_close(found, last, **close)
    found = embedding(files[kind], folder, output, pool="mean")
    torch.testing.assert_close(found, last.mean((2, 3)), **close)
    maps = network.forward_intermediates(images, intermediates_only=True)
    assert [m.shape[-1] for m in maps] == [16, 8, 4, 2]
    found = embedding(files[kind], folder, output, features="map", stage=2)
    torch.testing.assert_close(found, maps[1], **close)
    found = embedding(files[kind], folder, output, stage=4)
    torch.testing.assert_close(found, maps[3].mean((2, 3)), **close)


def test_another_size_of_pictures(tmp_path: Path, files: dict[str, Path], folder: Path) -> None:
    found = embedding(
        files["spark"], folder, tmp_path / "e.npz", features="map", input_size=(40, 70)
    )
    assert found.shape == (5, 64, 1, 2)  # no multiples of 16
    options = shared(files["classifier"], folder, tmp_path / "p.csv")
    with pytest.raises(OptionError, match="input_size 3 x 3: timm:test_convnext cannot take such"):
        predict(PredictConfig(**options, input_size=3))
    assert not (tmp_path / "p.csv").exists()
    file = str(tmp_path / "of_size.safetensors")
    convert(ConvertConfig(str(files["classifier"]), file, input_size=50))
    assert open_weights(file).config["img_size"] == [50, 50]


def test_what_is_refused(tmp_path: Path, files: dict[str, Path], folder: Path) -> None:
    options = shared(files["classifier"], folder, tmp_path / "e.npz")
    with pytest.raises(OptionError, match="pool token: timm:test_convnext of .* has no tokens"):
        embed(EmbedConfig(**options, pool="token"))
    dilated = convmae.create_model("timm:test_resnet", img_size=64, num_classes=3, output_stride=8)
    odd = save_weights(tmp_path / "odd", dilated, "timm:test_resnet", None, PICTURES)
    with pytest.raises(OptionError, match="stage 4: timm:test_resnet has no map of stride 32"):
        embed(EmbedConfig(**(options | {"checkpoint": str(odd)}), stage=4))
    with pytest.raises(OptionError, match="is an encoder without a classifier"):
        predict(PredictConfig(**shared(files["spark"], folder, tmp_path / "p.csv")))
    with pytest.raises(OptionError, match="is a timm:test_convnext without a classifier"):
        evaluate(EvaluateConfig(**shared(files["fcmae"], folder, None)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd"]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["classifier", "spark"])
@pytest.mark.thorough
def test_onnx(tmp_path: Path, files: dict[str, Path], kind: str) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    output = tmp_path / "m.onnx"
    report = convmae.convert(ConvertConfig(checkpoint=str(files[kind]), output=str(output)))
    images = torch.randn(3, 3, 64, 64)
    session = runtime.InferenceSession(str(output), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images.numpy()})
    if kind == "classifier":
        expected = plain(files[kind], 3)(images)
        assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == list(CLASSES)
        assert "logits [batch, 3]" in str(report)
    else:
        expected = plain(files[kind], 0, "sparse_encoder.sp_cnn.").forward_features(images)
        assert "features [batch, 64, 2, 2]" in str(report)
        assert "no classifier is in it: an encoder alone" in str(report)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4)
