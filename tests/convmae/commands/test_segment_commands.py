"""`convmae segment evaluate` and `predict`: the figures of training again, and label maps."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from convmae import DataError, OptionError, cli
from convmae.commands.segment_evaluate import segment_evaluate
from convmae.commands.segment_predict import segment_predict
from convmae.config import SegmentEvaluateConfig, SegmentPredictConfig, SegmentTrainConfig
from convmae.records import log as logs
from convmae.tasks.measures.label_measures import confusion_matrix, figures
from convmae.tasks.segment import segment_train
from tests.support.label_map_files import ade_layout, drawn, write
from tests.support.training_runs import DEVICE

if TYPE_CHECKING:
    from pathlib import Path

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("torchvision")
pytest.importorskip("timm")
pytest.importorskip("torchmetrics")

HOW: dict[str, Any] = {"num_workers": 0, "amp": "float32", "device": DEVICE}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Label k of class k - 1, and 0 for what is ignored, as in ADE20K; the names in a file."""
    root = ade_layout(tmp_path_factory.mktemp("data"), 8, 3)
    for path in (root / "annotations").rglob("*.png"):
        classes = np.array(Image.open(path)) + 1
        classes[:3] = 0
        write(path, classes)
    (root / "names.txt").write_text("ground\nred box\nblue box\n")
    return root


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    segment_train(
        SegmentTrainConfig(
            data_path=str(data),
            output_dir=str(folder),
            model="convvit_tiny",
            head="light",
            head_width=16,
            input_size=32,
            batch_size=8,
            steps=3,
            warmup_epochs=0,
            lr=1e-3,
            short_side=48,
            reduce_zero_label=True,
            class_names=str(data / "names.txt"),
            **HOW,
        )
    )
    return folder


@pytest.mark.thorough
def test_evaluate_gives_the_figures_of_training(
    data: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What label maps mean and how pictures are resized is as the run was told."""
    output = tmp_path / "found.json"
    arguments = ["segment", "evaluate", "--checkpoint", str(run), "--data_path", str(data)]
    options = [f"--{name}={value}" for name, value in HOW.items()]
    assert cli.main([*arguments, *options, "--output", str(output)]) == 0
    out, error = capsys.readouterr()
    (last,) = [e for e in logs.read_log(run) if e.get("event") == "evaluation"][-1:]
    found = json.loads(output.read_text())
    for name in ("miou", "macc", "aacc", "miou_foreground", "loss"):
        assert found[name] == pytest.approx(last[name], rel=1e-6)
    assert list(found["classes"]) == ["ground", "red box", "blue box"]
    assert found["images"] == 3 and sum(map(sum, found["confusion"])) == 3 * 37 * 56
    assert f"mIoU {found['miou']:.2f} %" in out and "\nred box" in out
    assert "as the run of the checkpoint was told: reduce_zero_label True" in error


def test_evaluate_refuses_other_classes_and_models(data: Path, run: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"checkpoint": str(run), "data_path": str(data)} | HOW
    (tmp_path / "names.txt").write_text("ground\nblue box\nred box\n")
    with pytest.raises(
        OptionError, match="3 classes: 'ground', 'blue box', 'red box'; but checkpo"
    ):
        segment_evaluate(SegmentEvaluateConfig(**common, class_names=str(tmp_path / "names.txt")))
    with pytest.raises(DataError, match="3 of 3 label maps .* beyond the 3 classes"):
        segment_evaluate(SegmentEvaluateConfig(**common, reduce_zero_label=False, ignore_label=9))
    with pytest.raises(OptionError, match="stride 64 x 64 is larger than the windows of 32 x 32"):
        segment_evaluate(SegmentEvaluateConfig(**common, stride=64))
    with pytest.raises(OptionError, match="nb_classes 3 has no effect here"):
        segment_evaluate(SegmentEvaluateConfig(**common, nb_classes=3))
    with pytest.raises(OptionError, match="checkpoint .* does not exist"):
        segment_evaluate(SegmentEvaluateConfig(**common | {"checkpoint": str(tmp_path / "no")}))


def test_small_targets_can_be_asked_for(data: Path, run: Path) -> None:
    found = segment_evaluate(
        SegmentEvaluateConfig(str(run), str(data), metrics="small-targets", **HOW)
    )
    assert found["targets"] >= 3 and 0 <= found["pd"] <= 100 and found["fa"] >= 0


def test_predicted_label_maps_are_what_evaluate_measures(
    data: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "predicted"
    folder = data / "images" / "validation"
    config = SegmentPredictConfig(str(run), str(folder), output_dir=str(output), **HOW)
    assert segment_predict(config).written == 3
    matrix = torch.zeros(3, 3, dtype=torch.int64)
    for path in sorted(folder.iterdir()):
        with Image.open(output / "label_maps" / f"{path.stem}.png") as opened:
            assert opened.mode == "P"
            predicted = torch.from_numpy(np.array(opened)).long()
        truth = torch.from_numpy(
            np.array(Image.open(data / "annotations" / "validation" / f"{path.stem}.png"))
        ).long()
        truth = torch.where(truth == 0, 255, truth - 1)
        matrix += confusion_matrix(predicted[None], truth[None], 3)
        overlay = Image.open(output / "overlays" / f"{path.stem}.png")
        assert overlay.size == (truth.shape[1], truth.shape[0])
    evaluated = segment_evaluate(SegmentEvaluateConfig(str(run), str(data), **HOW))
    assert 100 * figures(matrix)["miou"] == pytest.approx(evaluated["miou"], rel=1e-6)
    assert (output / "classes.txt").read_text() == "ground\nred box\nblue box\n"
    with pytest.raises(
        OptionError, match="holds predictions already; give another folder, or over"
    ):
        segment_predict(config)


def test_predict_takes_pictures_of_any_size_and_names_broken_ones(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = tmp_path / "pictures"
    write(pictures / "a" / "small.png", drawn(0, (16, 20))[0])
    write(pictures / "b" / "wide.jpg", drawn(1, (33, 150))[0])
    (pictures / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    output = tmp_path / "predicted"
    arguments = ["segment", "predict", "--checkpoint", str(run), "--data_path", str(pictures)]
    arguments += ["--output", str(output), "--no_overlays", "--max_unreadable", "0.5"]
    assert cli.main([*arguments, *[f"--{name}={value}" for name, value in HOW.items()]]) == 0
    out, error = capsys.readouterr()
    assert "wrote 2 label maps" in out and "1 pictures unreadable" in out
    assert "broken.png" in error
    sizes = {p.stem: Image.open(p).size for p in (output / "label_maps").rglob("*.png")}
    assert sizes == {"small": (20, 16), "wide": (150, 33)}
    assert not (output / "overlays").exists()
    shutil.copy(pictures / "a" / "small.png", pictures / "a" / "small.bmp")
    with pytest.raises(DataError, match="label maps would have the same name; rename one"):
        segment_predict(SegmentPredictConfig(str(run), str(pictures), output_dir="x", **HOW))
    with pytest.raises(OptionError, match="lies in data_path .*; give a folder outside"):
        segment_predict(
            SegmentPredictConfig(str(run), str(pictures), output_dir=str(pictures / "x"), **HOW)
        )
    with pytest.raises(OptionError, match="4 channels, but the model takes 3"):
        segment_predict(
            SegmentPredictConfig(
                str(run),
                str(pictures / "b"),
                output_dir=str(tmp_path / "four"),
                second_images=str(pictures / "b"),
                **HOW,
            )
        )
