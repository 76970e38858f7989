"""`detect evaluate`, `predict` and `convert`: figures and results of one small detector."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image
from pycocotools.coco import COCO

from convmae.cli import main
from convmae.commands.detect_evaluate import detect_evaluate
from convmae.config import DetectEvaluateConfig, OptionError
from convmae.records.log import read_log
from convmae.tasks.detect import detect_train
from convmae.tasks.measures.average_precision import compare
from tests.support.detection_runs import detection_config
from tests.support.object_files import write_m3fd, write_shapes, write_voc

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """A data set, and the run of a detector on it."""
    folder = tmp_path_factory.mktemp("detector")
    data = write_shapes(folder / "data", train=2, val=3)
    detect_train(detection_config(data, folder / "run", steps=1))
    return data, folder / "run"


def run(*words: Any) -> int:
    return main([*map(str, words), "--num_workers", "0", "--device", "cpu", "--amp", "float32"])


def test_evaluate_gives_the_figures_of_the_run(made, tmp_path, capsys):
    data, folder = made
    output = tmp_path / "figures.json"
    places = ("--checkpoint", folder, "--data_path", data, "--output", output)
    assert run("detect", "evaluate", *places) == 0
    told = json.loads(output.read_text())
    entry = [e for e in read_log(folder) if e.get("event") == "evaluation"][-1]
    for name in ("box_ap", "box_ap50", "mask_ap", "box_ar"):
        assert told[name] == pytest.approx(entry[name], abs=1e-9)
    assert told["images"] == 3
    assert set(told["classes"]) == {"disc", "square"}
    printed = capsys.readouterr().out
    assert "box AP" in printed and "on 3 pictures" in printed and "disc:" in printed


def test_results_of_predict_are_what_evaluate_measures(made, tmp_path):
    data, folder = made
    truth = data / "annotations" / "instances_val.json"
    output, drawn = tmp_path / "results.json", tmp_path / "drawn"
    places = ("--checkpoint", folder, "--data_path", data / "val", "--output", output)
    options = ("--pictures", drawn, "--draw_score", 0, "--coco_ids", truth)
    assert run("detect", "predict", *places, *options) == 0
    entries = json.loads(output.read_text())
    assert entries and set(entries[0]) >= {"image_id", "category_id", "bbox", "score"}
    assert COCO(truth).loadRes(str(output)).getAnnIds()
    config = DetectEvaluateConfig(
        checkpoint=str(folder), data_path=str(data), num_workers=0, device="cpu", amp="float32"
    )
    measured = detect_evaluate(config)
    content = json.loads(truth.read_text())
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        found, _ = compare(content, entries, kind)
        assert found["ar"] == pytest.approx(measured[f"{name}_ar"], abs=1e-6)
        assert found["ap"] == pytest.approx(measured[f"{name}_ap"], abs=1e-6)
    pictures = sorted(drawn.iterdir())
    assert [picture.suffix for picture in pictures] == [".png"] * 3
    stored = Image.open(data / "val" / "001.png")
    assert Image.open(pictures[0]).size == stored.size
    assert Image.open(pictures[0]).tobytes() != stored.tobytes()


def test_outputs_are_not_written_over(made, tmp_path, capsys):
    data, folder = made
    output = tmp_path / "results.json"
    output.write_text("kept")
    places = ("--checkpoint", folder, "--data_path", data / "val")
    assert run("detect", "predict", *places, "--output", output) == 2
    assert "--output" in capsys.readouterr().err and output.read_text() == "kept"
    inside = ("--output", tmp_path / "new.json", "--pictures", data / "val" / "drawn")
    assert run("detect", "predict", *places, *inside) == 2
    assert "--pictures" in capsys.readouterr().err
    assert main(["detect", "convert", "--data_path", str(data), "--output", str(output)]) == 2
    assert output.read_text() == "kept"


def test_other_classes_and_channels_are_refused(made, tmp_path):
    _, folder = made
    voc = write_voc(tmp_path / "voc")
    for file in (voc / "Annotations").iterdir():
        file.write_text(file.read_text().replace("square", "sqare"))
    common: dict[str, Any] = {"checkpoint": str(folder), "num_workers": 0, "device": "cpu"}
    with pytest.raises(OptionError, match="does not know 1: 'sqare'"):
        detect_evaluate(DetectEvaluateConfig(data_path=str(voc), **common))
    pairs = write_m3fd(tmp_path / "pairs", as_yolo=True)
    (pairs / "names.txt").write_text("disc\nsquare\n")
    config = DetectEvaluateConfig(
        data_path=str(pairs), second_images="ir", class_names="names.txt", **common
    )
    with pytest.raises(OptionError, match="4 channels"):
        detect_evaluate(config)


def test_convert_writes_what_coco_reads(tmp_path, capsys):
    voc = write_voc(tmp_path / "voc")
    output = tmp_path / "boxes.json"
    words = ["detect", "convert", "--data_path", str(voc), "--output", str(output)]
    assert main(words) == 0
    assert "2 pictures, 3 objects of 2 classes" in capsys.readouterr().out
    coco = COCO(output)
    assert [image["file_name"] for image in coco.loadImgs(coco.getImgIds())] == ["a.jpg", "b.jpg"]
    (first, *_) = coco.loadAnns(coco.getAnnIds([1]))
    assert first["bbox"] == [4, 6, 20, 24]


def test_a_classifier_does_not_detect(tmp_path, capsys):
    import convmae
    from convmae.weights.checkpoint import save_weights

    model = convmae.create_model("convvit_tiny", img_size=32, num_classes=2)
    path = save_weights(tmp_path, model, "convvit_tiny")
    places = ("--checkpoint", path, "--data_path", tmp_path, "--output", tmp_path / "a.json")
    assert run("detect", "predict", *places) == 2
    assert "does not detect objects" in capsys.readouterr().err
