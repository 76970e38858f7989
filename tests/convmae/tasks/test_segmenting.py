"""Training a segmenter on pictures that are drawn: what it leaves, exact resume, refusals."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from convmae import DataError, OptionError
from convmae.config import SegmentTrainConfig
from convmae.config.label_maps import IGNORED
from convmae.models import create_model
from convmae.records import log as logs
from convmae.tasks.segment import Segmentation, segment_train
from convmae.training.optim import layered_groups
from convmae.weights.checkpoint import open_weights
from tests.support.label_map_files import SIZE, ade_layout, drawn, write
from tests.support.training_processes import finish, flags, losses, start
from tests.support.training_runs import DEVICE, curve, interrupt_after, same, tensors

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("torchvision")
pytest.importorskip("timm")
pytest.importorskip("torchmetrics")

SHORT: dict[str, Any] = {
    "model": "convvit_tiny",
    "head": "light",
    "head_width": 16,
    "input_size": 32,
    "batch_size": 4,
    "epochs": 2,
    "warmup_epochs": 1,
    "lr": 1e-3,
    "drop_path": 0.1,
    "log_every": 1,
    "num_workers": 0,
    "amp": "float32",
    "device": DEVICE,
}


def options(data: Path, folder: Path, **changes: Any) -> SegmentTrainConfig:
    """2 epochs of 2 steps."""
    return SegmentTrainConfig(
        **(SHORT | {"data_path": str(data), "output_dir": str(folder)} | changes)
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ade_layout(tmp_path_factory.mktemp("data"), 8, 3)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    segment_train(options(data, folder))
    return folder


def evaluations(folder: Path) -> list[tuple[float, ...]]:
    return [
        (e["step"], e["miou"], e["macc"], e["aacc"], e["loss"])
        for e in logs.read_log(folder)
        if e.get("event") == "evaluation"
    ]


def test_what_a_run_leaves(trained: Path) -> None:
    assert [step for step, *_ in evaluations(trained)] == [2, 4]
    weights = open_weights(trained)
    assert weights.model == "segment:convvit_tiny"
    assert weights.classes == ("0", "1", "2") and weights.config["num_classes"] == 3
    best = open_weights(trained / "best" / "model.safetensors")
    scores = {step: miou for step, miou, *_ in evaluations(trained)}
    if scores[4] > scores[2]:
        assert same(best.state, weights.state)
    found = json.loads((trained / "evaluation" / "found.json").read_text())
    assert found["step"] == 4
    assert found["figures"]["scores"]["miou"] == evaluations(trained)[-1][1]
    assert sum(map(sum, found["figures"]["confusion"])) == 3 * SIZE[0] * SIZE[1]
    assert [row[0] for row in found["tables"][0][2]] == ["0", "1", "2"]
    page = (trained / "report.html").read_text()
    for text in ("Last evaluation", "Confusion matrix", "The worst pictures", "Best mIoU"):
        assert text in page
    assert "convmae segment train" in page and "Predictions" in page
    assert len(list((trained / "predictions").glob("step-*.png"))) == 2
    assert not (trained / "reconstructions").exists()


def test_a_run_goes_on_bit_by_bit(
    data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    interrupt_after(monkeypatch, 3)
    assert segment_train(options(data, folder)).steps == 3
    monkeypatch.undo()
    assert segment_train(options(data, folder, resume="auto", num_workers=1)).steps == 4
    assert curve(folder) == curve(trained)
    assert evaluations(folder) == evaluations(trained)
    assert same(tensors(folder), tensors(trained))


def test_what_changes_between_two_parts_of_a_run_is_refused(
    data: Path, trained: Path, tmp_path: Path
) -> None:
    """Label maps are of the data set as pictures are."""
    other = ade_layout(tmp_path / "data", 8, 3)
    resume: dict[str, Any] = {"resume": str(trained), "epochs": 3}
    with pytest.raises(OptionError) as caught:
        segment_train(options(data, tmp_path / "a", nb_classes=5, **resume))
    assert "the label maps have 5 classes: '0', '1', '2', '3', '4'; but --resume" in (
        caught.value.with_flags
    )
    write(other / "annotations" / "training" / "p3.png", np.full(SIZE, 1, np.uint8))
    with pytest.raises(OptionError, match="1 of another size .annotations/training/p3.png."):
        segment_train(options(other, tmp_path / "b", **resume))
    assert not (tmp_path / "a" / "log.txt").exists() and not (tmp_path / "b" / "log.txt").exists()


def test_it_starts_from_the_trunk_of_another_model(
    data: Path, trained: Path, tmp_path: Path
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("ground\nred\nblue\n")
    changes: dict[str, Any] = {"model": None, "class_names": str(names), "steps": 1}
    folder = tmp_path / "run"
    segment_train(options(data, folder, init=str(trained), lr=1e-12, **changes))
    mine, theirs = tensors(folder), tensors(trained)
    trunk = [k for k in mine if k.startswith("backbone.") and k.endswith("weight")]
    assert trunk and all(torch.allclose(mine[k], theirs[k], atol=1e-6) for k in trunk)
    assert not torch.allclose(
        mine["decode_head.conv_seg.weight"], theirs["decode_head.conv_seg.weight"]
    )
    assert open_weights(folder).classes == ("ground", "red", "blue")
    with pytest.raises(OptionError, match="init.* but the backbone is convvit_small"):
        segment_train(
            options(
                data, tmp_path / "no", init=str(trained), **changes | {"model": "convvit_small"}
            )
        )
    assert not (tmp_path / "no" / "log.txt").exists()


def test_small_targets_of_one_channel(tmp_path: Path) -> None:
    for split, numbers in (("train", range(4)), ("val", range(4, 6))):
        for number in numbers:
            picture, classes = drawn(number)
            write(tmp_path / "data" / split / "images" / f"{number}.png", picture[..., 0])
            mask = (classes == 1).astype(np.uint8) * 255
            write(tmp_path / "data" / split / "masks" / f"{number}.bmp", mask)
    small = {"binary_masks": True, "in_chans": 1, "metrics": "small-targets", "loss": "ce+dice"}
    summary = segment_train(options(tmp_path / "data", tmp_path / "run", steps=1, **small))
    assert {"iou", "niou", "pd", "fa", "miou"} <= summary.evaluation.keys()
    assert "Pd, targets found" in str(summary)
    weights = open_weights(tmp_path / "run")
    assert weights.classes == ("background", "target") and weights.config["in_chans"] == 1
    state = torch.load(tmp_path / "run" / "checkpoint" / "training_state.pt")
    assert state["task"]["best"] == summary.evaluation["iou"]


def test_pictures_that_cannot_be_read_are_replaced_and_named(tmp_path: Path) -> None:
    root = ade_layout(tmp_path / "data", 6, 2)
    for path in (root / "annotations/training/p1.png", root / "images/validation/p100.jpg"):
        path.write_bytes(path.read_bytes()[:90])
    found = segment_train(
        options(root, tmp_path / "run", steps=2, batch_size=2, max_unreadable=0.5)
    )
    assert [name.rpartition("/")[2] for name in found.unreadable] == ["p1.jpg"]
    assert np.isfinite(found.evaluation["miou"])
    with pytest.raises(DataError, match="1 of 2 pictures cannot be read .*p100.jpg"):
        segment_train(options(root, tmp_path / "no", max_unreadable=0.2))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.thorough
def test_two_processes_train_as_one(strategy: str, data: Path, tmp_path: Path) -> None:
    """Of three held-out pictures one process sees two: processes have other numbers of windows."""
    one, two = tmp_path / "one", tmp_path / "two"
    common = SHORT | {"data_path": data, "steps": 2, "distort": False}
    common |= {"drop_path": 0.0, "dropout": 0.0}
    segment_train(SegmentTrainConfig(**common | {"data_path": str(data), "output_dir": str(one)}))
    half = common | {"batch_size": 2, "output_dir": two, "strategy": strategy}
    finish(start(["segment", "train", *flags(**half)], processes=2))
    assert len(losses(two)) == 2 and losses(two)[0][2] == pytest.approx(losses(one)[0][2], rel=1e-5)
    (first,), (second,) = evaluations(one), evaluations(two)
    assert first[0] == second[0] == 2
    assert second[1:] == pytest.approx(first[1:], rel=0.02)


def test_a_held_out_picture_that_breaks_off_is_told_and_not_drawn(tmp_path: Path) -> None:
    data = ade_layout(tmp_path / "data", 8, 3)
    picture = min((data / "images" / "validation").iterdir())
    picture.write_bytes(picture.read_bytes()[:-80])  # its header is whole
    folder = tmp_path / "run"
    segment_train(options(data, folder, max_unreadable=0.5, epochs=1))
    told = [e for e in logs.read_log(folder) if e.get("event") == "unreadable"]
    assert [entry["path"] for entry in told] == [str(picture)]
    assert (folder / "prediction.png").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "none"}, "head must be one of upernet, light"),
        ({"scale": (2.0, 0.5)}, "scale must be the smaller factor and the larger, got 2 0.5"),
        ({"min_crop": 0.5}, "min_crop 0.5 has no effect on segment train"),
        ({"model": "convvit_tine"}, "model 'convvit_tine': there is no backbone"),
        ({"class_weights": (1.0,)}, "class_weights must be 3 finite numbers"),
        ({"most_of_one_class": 0}, "most_of_one_class must be a number above 0"),
        ({"steps": 0}, "steps must be a whole number above 0"),
        ({"input_size": 40}, "input_size must be multiples of 16"),
        ({"batch_size": 64}, "needs 64 pictures a step, but .* has 8"),
        ({"adapt_input": "sum"}, "adapt_input sum has no effect without init"),
        ({"eval_batch_size": 0}, "eval_batch_size must be a whole number above 0"),
    ],
)
def test_options_that_cannot_work(
    data: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        segment_train(options(data, tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "log.txt").exists()


def test_label_maps_that_do_not_fit_are_refused_before_training(tmp_path: Path) -> None:
    """The cases are those of tests/convmae/data/test_label_maps.py; here, that a run asks."""
    root = ade_layout(tmp_path / "data", 4, 2)
    with pytest.raises(DataError, match="4 of 4 label maps .* beyond the 2 classes"):
        segment_train(options(root, tmp_path / "run", nb_classes=2))
    (root / "annotations" / "validation" / "p101.png").unlink()
    with pytest.raises(DataError, match="1 of 2 label maps are missing .*: p101;"):
        segment_train(options(root, tmp_path / "run"))
    assert not (tmp_path / "run" / "log.txt").exists()


def test_the_published_recipe_is_the_default() -> None:
    """`SEG/configs/upernet_convmae.py`: 160,000 steps of 16 pictures of ADE20K's 20,210."""
    config = SegmentTrainConfig()
    per_epoch = 20210 // 16
    assert config.total_steps(per_epoch) == pytest.approx(160_000, rel=0.005)
    assert config.warmup_epochs * per_epoch == pytest.approx(1500, rel=0.02)
    assert config.peak_lr() == pytest.approx(1e-4) and config.weight_decay == 0.05
    assert (config.size, config.short, config.scale) == ((512, 512), 512, (0.5, 2.0))
    assert (config.layer_decay, config.drop_path, config.sched) == (0.75, 0.2, "linear")
    assert dataclasses.replace(config, short_side=0).short is None


def test_layers_learn_at_the_published_rates() -> None:
    """Factors and decays that the official optimizer gives, recorded in dense_tasks.md."""
    with torch.device("meta"):
        model = create_model(
            "segment:convvit_base", num_classes=3, img_size=32, head_width=8, aux_width=8
        )
    groups = layered_groups(model, 0.05, 0.75)
    rates = {}
    for group in groups:
        for parameter in group["params"]:
            rates[id(parameter)] = group["lr_scale"], group["weight_decay"]
    found = {name: rates[id(parameter)] for name, parameter in model.named_parameters()}
    assert found["backbone.pos_embed"] == (pytest.approx(0.031676, rel=1e-4), 0.05)
    assert found["backbone.patch_embed4.weight"][0] == pytest.approx(0.031676, rel=1e-4)
    assert found["backbone.blocks3.0.attn.qkv.weight"][0] == pytest.approx(0.042235, rel=1e-4)
    assert found["backbone.blocks3.10.attn.qkv.bias"] == (pytest.approx(0.75), 0.0)
    assert found["backbone.blocks3.3.gamma_1"][1] == 0.0
    assert found["backbone.blocks3.3.attn.relative_position_bias_table"][1] == 0.05
    assert found["backbone.fpn.0.weight"] == found["decode_head.conv_seg.weight"] == (1.0, 0.05)


def test_padding_of_crops_is_ignored_and_has_the_mean_of_the_pictures(data: Path) -> None:
    task = Segmentation()
    transform = task.transform(options(data, data))
    assert transform.fill is None and int(transform.target_of_filler((2, 2)).min()) == IGNORED
