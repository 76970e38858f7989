"""`detect train`: what a run learns from, what it leaves, and that it goes on as it would have."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import convmae
from convmae.commands.detect_evaluate import detect_evaluate
from convmae.config import DetectEvaluateConfig, OptionError
from convmae.data import DataError, Statistics
from convmae.records.log import read_log
from convmae.tasks.detect import Detection, detect_train
from convmae.tasks.detection_steps import canvas, sizes_seen
from convmae.training.optim import layered_groups
from tests.support.detection_runs import SMALL, detection_config
from tests.support.object_files import CLASSES, write_m3fd, write_shapes
from tests.support.training_processes import finish, flags, start

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes") / "data", train=5, val=2)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """A run of four steps without a break."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    detect_train(detection_config(data, output))
    return output


def losses(run: Path) -> list[float]:
    return [entry["loss"] for entry in read_log(run) if "event" not in entry]


def figures(run: Path) -> dict[str, float]:
    entry = [e for e in read_log(run) if e.get("event") == "evaluation"][-1]
    return {name: value for name, value in entry.items() if "_a" in name}


def test_a_run_leaves_losses_figures_weights_and_a_page(data, whole):
    assert len(losses(whole)) == 4
    assert all(map(math.isfinite, losses(whole)))
    found = figures(whole)
    assert {"box_ap", "box_ap50", "mask_ap", "mask_ap50"} <= set(found)
    for folder in ("best", "checkpoint"):
        weights = convmae.open_weights(whole / folder / "model.safetensors")
        assert weights.model == "detect:convvit_tiny"
        assert weights.classes == CLASSES
    told = json.loads((whole / "evaluation" / "found.json").read_text())
    assert set(told["figures"]["classes"]) == set(CLASSES)
    page = (whole / "report.html").read_text()
    assert "Average precision of each class" in page
    assert "Objects by true and found class" in page
    assert "The worst pictures" in page
    objects = json.loads((data / "annotations" / "instances_val.json").read_text())["annotations"]
    confusion = np.array(told["figures"]["confusion"])
    assert confusion.shape == (len(CLASSES) + 1, len(CLASSES) + 1)
    assert confusion[:-1].sum() == len(objects)
    assert (whole / "prediction.png").is_file()


@pytest.mark.thorough
def test_an_interrupted_run_goes_on_to_the_same_losses_and_figures(data, whole, tmp_path):
    config = detection_config(data, tmp_path / "run", steps=3)
    detect_train(config)
    # The schedule of the whole run: a constant rate does not tell how long a run is.
    detect_train(detection_config(data, tmp_path / "run", steps=4, resume="auto"))
    first = detection_config(data, tmp_path / "constant", sched="constant")
    detect_train(first)
    again = {"sched": "constant", "resume": "auto"}
    for steps in (1, 3, 4):
        part = detection_config(data, tmp_path / "parts", steps=steps, **again)
        detect_train(part)
    assert losses(tmp_path / "parts") == losses(tmp_path / "constant")
    assert figures(tmp_path / "parts") == figures(tmp_path / "constant")
    one = convmae.open_weights(tmp_path / "parts").state
    other = convmae.open_weights(tmp_path / "constant").state
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.thorough
def test_two_processes_copy_or_divide_the_model_and_find_the_same(data, tmp_path):
    """What is drawn differs from process to process, but not with the strategy."""
    options = SMALL | {"data_path": data, "norm": "batch", "batch_size": 1, "steps": 2}
    for strategy in ("ddp", "fsdp2"):
        options |= {"strategy": strategy, "output_dir": tmp_path / strategy}
        output = finish(start(["detect", "train", *flags(**options)], processes=2))
        assert "BatchNorms share their statistics over the processes" in output
    assert losses(tmp_path / "fsdp2") == pytest.approx(losses(tmp_path / "ddp"), rel=1e-5)
    found = figures(tmp_path / "ddp")
    assert figures(tmp_path / "fsdp2") == pytest.approx(found, abs=0.1)
    alone = DetectEvaluateConfig(
        str(tmp_path / "ddp"), data_path=str(data), num_workers=0, amp="float32", device="cpu"
    )
    result = detect_evaluate(alone)
    assert {name: result[name] for name in found} == pytest.approx(found, abs=1e-6)


@pytest.mark.thorough
def test_changed_boxes_and_classes_are_told_on_resuming(tmp_path):
    data = write_shapes(tmp_path / "data", train=3, val=1)
    config = {"steps": 1, "batch_size": 1}
    detect_train(detection_config(data, tmp_path / "run", **config))
    file = data / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    changed = json.loads(file.read_text())
    changed["annotations"][0]["bbox"][2] -= 1
    file.write_text(json.dumps(changed))
    again = config | {"steps": 2, "resume": "auto"}
    with pytest.raises(OptionError, match="instances_train.json"):
        detect_train(detection_config(data, tmp_path / "run", **again))
    content["categories"][0]["name"] = "ring"
    file.write_text(json.dumps(content))
    other = data / "annotations" / "instances_val.json"
    other.write_text(other.read_text().replace('"disc"', '"ring"'))
    with pytest.raises(OptionError, match="'ring'"):
        detect_train(detection_config(data, tmp_path / "run", allow_changed_data=True, **again))


@pytest.mark.parametrize(
    "kind",
    [
        {"channels": 1, "dtype": np.uint16},
        {"channels": 12, "dtype": np.uint16},
    ],
)
def test_pictures_of_other_channels_and_bits(tmp_path, kind):
    data = write_shapes(tmp_path / "data", train=2, val=1, **kind)
    detect_train(detection_config(data, tmp_path / "run", steps=1))
    weights = convmae.open_weights(tmp_path / "run")
    assert weights.config["in_chans"] == kind["channels"]
    assert math.isfinite(losses(tmp_path / "run")[0])


def test_boxes_alone_of_two_folders_and_a_network_of_timm(tmp_path):
    data = write_m3fd(tmp_path / "data", as_yolo=True)
    (data / "names.txt").write_text("disc\nsquare\n")
    options = {
        "masks": False,
        "second_images": "ir",
        "class_names": "names.txt",
        "model": "timm:resnet18",
        "window_size": None,
        "steps": 1,
        "drop_path": 0.0,
    }
    detect_train(detection_config(data, tmp_path / "run", **options))
    assert convmae.open_weights(tmp_path / "run").config["in_chans"] == 4
    assert "mask_ap" not in figures(tmp_path / "run")


def test_starting_from_a_run_of_a_detector(data, whole, tmp_path, capsys):
    started = {"init": str(whole), "model": None, "steps": 1, "pyramid": "simple", "norm": None}
    detect_train(detection_config(data, tmp_path / "run", **started))
    weights = convmae.open_weights(tmp_path / "run")
    assert weights.model == "detect:convvit_tiny"
    assert weights.config["kind"] == "vitdet"
    assert "random weights" not in capsys.readouterr().out


@pytest.mark.parametrize("padding", ["grey", "mean"])
def test_the_canvas_around_the_picture(padding):
    statistics = Statistics((0.5, 0.25), (0.1, 0.2))
    images = torch.ones(1, 2, 8, 8)
    targets = [{"region": torch.tensor([2, 0, 8, 5])}]
    images = canvas(images, targets, statistics, padding)
    assert images[0, :, :5, 2:].eq(1).all()
    expected = [(128 / 255 - 0.5) / 0.1, (128 / 255 - 0.25) / 0.2] if padding == "grey" else [0, 0]
    assert images[0, :, 7, 0].tolist() == pytest.approx(expected, abs=1e-6)
    assert images[0, :, 0, 1].tolist() == pytest.approx(expected, abs=1e-6)
    seen = sizes_seen(images, targets, padding)
    assert seen == ([(8, 8)] if padding == "grey" else [(5, 6)])


def test_decay_and_layers_are_those_of_the_published_recipes():
    options = {name: SMALL[name] for name in ("window_size", "width", "box_features")}
    model = convmae.create_model(
        "detect:convvit_tiny", num_classes=2, kind="vitdet", img_size=64, **options
    )
    groups = layered_groups(model, 0.1, 0.8, decay_all=True)
    by_name = {}
    for name, parameter in model.named_parameters():
        for group in groups:
            if any(parameter is other for other in group["params"]):
                by_name[name] = (group["weight_decay"], group["lr_scale"])
    assert set(by_name) == {name for name, p in model.named_parameters() if p.requires_grad}
    # Biases are decayed, norms of the trunk and positions are not; heads have the whole rate.
    first = next(name for name in by_name if "patch_embed1.proj.bias" in name)
    assert by_name[first] == (0.1, pytest.approx(0.8 ** (model.num_layers - 1)))
    positions = next(name for name in by_name if name.endswith("pos_embed"))
    assert by_name[positions] == (0.0, 1.0)
    head = next(name for name in by_name if name.startswith("roi_heads") and name.endswith("bias"))
    assert by_name[head] == (0.1, 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_path": "demo"}, "data_path must name a folder"),
        ({"annotations": "boxes.json"}, "the same for train and val"),
        ({"min_crop": 0.5}, "min_crop 0.5 has no effect"),
        ({"torchcompile": "inductor"}, "torchcompile inductor compiles the whole model"),
        ({"scale_max": 0.05}, "scale_max must be a number at least 0.1"),
        ({"sched": "step"}, "sched must be one of cosine, linear, constant, multistep"),
        ({"second_chans": 2}, "without second_images"),
        ({"pyramid": "simple", "model": "timm:resnet18"}, "pyramid simple is for"),
        ({"input_size": 100}, "multiples of 32"),
    ],
)
def test_options_that_cannot_work(tmp_path, changes, message):
    config = detection_config(tmp_path, tmp_path / "run")
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(OptionError, match=message):
        detect_train(config)
    assert not (tmp_path / "run").exists()


def test_data_that_cannot_be_learned(data, tmp_path):
    boxes = write_m3fd(tmp_path / "boxes", as_yolo=True)
    (boxes / "names.txt").write_text("disc\nsquare\n")
    with pytest.raises(DataError, match="has boxes alone, no masks; no_masks"):
        detect_train(detection_config(boxes, tmp_path / "run", class_names="names.txt"))
    with pytest.raises(OptionError, match="anchor_sizes"):
        detect_train(detection_config(data, tmp_path / "run", anchor_sizes=(8.0, 16.0)))
    with pytest.raises(OptionError, match="model 'convvit_tine'"):
        detect_train(detection_config(data, tmp_path / "run", model="convvit_tine"))
    assert not (tmp_path / "run").exists()


def test_multistep_divides_by_ten(data, tmp_path):
    from convmae.training.optim import make_scheduler

    config: Any = detection_config(
        data, tmp_path, sched="multistep", decay_at=(0.5, 0.75), steps=20, warmup_epochs=0.4
    )
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = make_scheduler(optimizer, config, 1.0, steps_per_epoch=10)
    rates = []
    for step in range(20):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])
    assert rates[9] == pytest.approx(1.0) and rates[11] == pytest.approx(0.1)
    assert rates[14] == pytest.approx(0.1) and rates[16] == pytest.approx(0.01)
    assert Detection.command == "detect train"
