"""Classes are matched by name from training to evaluation, resuming and finetuning again."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch

import convmae.data
from convmae import (
    EvaluateConfig,
    FinetuneConfig,
    LinprobeConfig,
    OptionError,
    evaluate,
    finetune,
    linprobe,
    open_weights,
)
from convmae.commands import evaluate as command
from convmae.data import IMAGENET, normalise
from convmae.data.classes import ClassNames, ClassNumbers
from convmae.tasks.finetune import Finetuning
from convmae.tasks.probe import Probing
from convmae.weights.checkpoint import save_weights
from convmae.weights.foreign import open_foreign
from convmae.weights.pretrained import load_pretrained
from tests.support.paths import FASHION
from tests.support.shard_files import write_shard
from tests.support.training_runs import DEVICE

if TYPE_CHECKING:
    from pathlib import Path

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("torchvision")
pytest.importorskip("timm")
pytest.importorskip("torchmetrics")

COLOURS = {
    "ant": (220, 30, 30),
    "bee": (30, 220, 30),
    "cat, or kitten": (30, 30, 220),
    'the "dog"': (200, 200, 200),
}
EACH = 3  # pictures of a class
UNSORTED = ("cat, or kitten", "ant", 'the "dog"', "bee")


def shade(name: str, number: int) -> tuple[int, ...]:
    return tuple(value + 4 * number for value in COLOURS[name])


def write_classes(folder: Path, names: Any) -> Path:
    """Class folders: `names` are folders and the colours in them, or both at once."""
    for name, colour in dict(names if isinstance(names, dict) else zip(names, names)).items():
        (folder / name).mkdir(parents=True)
        for number in range(EACH):
            Image.new("RGB", (32, 32), shade(colour, number)).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def perfect(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a model that tells the colours apart, in an order that is not sorted."""
    return save(tmp_path_factory.mktemp("perfect"), ClassNames(UNSORTED))


def save(folder: Path, classes: ClassNames | None, order: Any = UNSORTED) -> Path:
    """The head's row of a class is the mean of its features, its bias what makes it the nearest."""
    torch.manual_seed(0)
    model: Any = convmae.create_model("convvit_tiny", img_size=32, num_classes=len(order)).eval()
    with torch.no_grad():
        for row, name in enumerate(order):
            flat = [torch.tensor(shade(name, i), dtype=torch.uint8) for i in range(EACH)]
            images = torch.stack([colour[:, None, None].expand(3, 32, 32) for colour in flat])
            features = model.forward_head(
                model.forward_features(normalise(images, *IMAGENET)), pre_logits=True
            ).mean(0)
            model.head.weight[row] = features
            model.head.bias[row] = -0.5 * features.square().sum()
    return save_weights(folder, model, "convvit_tiny", None, IMAGENET, classes)


def figures(weights: Path, data: Path, **changes: Any) -> dict[str, Any]:
    config = EvaluateConfig(str(weights), str(data), device=DEVICE, amp="float32", num_workers=0)
    return evaluate(dataclasses.replace(config, **changes))


# -- evaluate -------------------------------------------------------------------------------------


def test_accuracy_stays_when_classes_are_reordered_or_missing(
    perfect: Path, tmp_path: Path
) -> None:
    whole = figures(perfect, write_classes(tmp_path / "whole", COLOURS.keys()))
    assert whole["acc1"] == 100 and whole["images"] == 4 * EACH and whole["notes"] == []
    for missing in COLOURS:
        rest = [name for name in COLOURS if name != missing]
        part = figures(perfect, write_classes(tmp_path / f"no {missing}", rest))
        assert part["acc1"] == 100 and part["images"] == 3 * EACH
        (note,) = part["notes"]
        assert "no pictures of 1 of the 4 classes" in note and repr(missing) in note
    swapped = {"ant": "bee", "bee": "ant"}  # names decide: these pictures are in the wrong folder
    assert figures(perfect, write_classes(tmp_path / "swapped", swapped))["acc1"] == 0


def test_added_and_renamed_classes_are_refused(
    perfect: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    added = dict(zip(COLOURS, COLOURS)) | {"aardvark": "ant"}
    with pytest.raises(OptionError, match=r"has 5 classes, .* does not know 1: 'aardvark'"):
        figures(perfect, write_classes(tmp_path / "added", added), output=str(tmp_path / "out"))
    renamed = {"hornet" if name == "bee" else name: name for name in COLOURS}
    with pytest.raises(OptionError, match=r"'hornet'; .* data_path .* lacks 1: 'bee'\. Found"):
        figures(perfect, write_classes(tmp_path / "renamed", renamed), output=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path / "added" / "aardvark")
    shutil.rmtree(tmp_path / "added" / "bee")
    (tmp_path / "added" / "wasp").mkdir()  # empty: told, as nothing in it is evaluated
    config = EvaluateConfig(str(perfect), str(tmp_path / "added"), device=DEVICE, num_workers=0)
    assert command.main(config) == 0
    text = capsys.readouterr().out
    assert "4 classes of --checkpoint" in text and "'bee'" in text
    assert "hold no picture: 'wasp'" in text and "accuracy 100.00 %" in text


def test_a_class_folder_or_its_val_folder_is_evaluated(perfect: Path, tmp_path: Path) -> None:
    """Each split has its own classes: those of train do not number those of val."""
    train = {f"a{i}": "ant" for i in range(3)} | dict(zip(COLOURS, COLOURS))
    write_classes(tmp_path / "train", train)
    write_classes(tmp_path / "val", ["bee", 'the "dog"'])
    for data in (tmp_path, tmp_path / "val"):
        assert figures(perfect, data)["acc1"] == 100
        assert figures(perfect, data)["images"] == 2 * EACH
    with pytest.raises(OptionError, match="'a0', 'a1', 'a2'"):
        figures(perfect, tmp_path, split="train")
    shutil.rmtree(tmp_path / "val")
    with pytest.raises(ValueError, match="train alone, which split train reads"):
        figures(perfect, tmp_path)


def test_without_names_sorted_order_decides_and_is_told(tmp_path: Path) -> None:
    data = write_classes(tmp_path / "data", COLOURS.keys())
    for classes in (None, ClassNumbers.of(4)):
        result = figures(save(tmp_path / "sorted", classes, sorted(COLOURS)), data)
        assert result["acc1"] == 100 and "matched with them in sorted order" in result["notes"][0]
    shutil.rmtree(data / "bee")
    with pytest.raises(OptionError, match=r"has 3 classes \('ant', .*has 4, whose names it does"):
        figures(tmp_path / "sorted", data)


def shard(folder: Path, names: list[str], classes: list[str] | None = None) -> Path:
    """A sample of each of `names`, its label the place there; `classes` in `sizes.json`."""
    members = []
    for number, name in enumerate(names):
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32), shade(name, 1)).save(buffer, "PNG")
        members += [(f"s{number}.png", buffer.getvalue()), (f"s{number}.cls", b"%d" % number)]
    write_shard(folder / "a.tar", members)
    if classes is not None:
        sizes = {"a.tar": len(names), "classes": classes}
        (folder / "sizes.json").write_text(json.dumps(sizes))
    return folder


def test_shards_are_matched_by_the_names_in_sizes(perfect: Path, tmp_path: Path) -> None:
    names = ["bee", "ant", 'the "dog"']
    assert figures(perfect, shard(tmp_path / "named", names, names))["acc1"] == 100
    numbered = figures(perfect, shard(tmp_path / "numbered", list(UNSORTED)))
    assert numbered["acc1"] == 100 and "taken as places" in numbered["notes"][0]
    pattern = str(tmp_path / "numbered" / "{a,a}.tar")
    assert figures(perfect, pattern)["images"] == 8  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="'wolf'"):
        figures(perfect, shard(tmp_path / "other", names, ["wolf", "ant", "bee"]))
    with pytest.raises(OptionError, match=r"label 4 \(.*a.tar: s4\), but checkpoint .* has 4"):
        figures(perfect, shard(tmp_path / "five", [*UNSORTED, "ant"]))


# -- training -------------------------------------------------------------------------------------

SHORT: dict[str, Any] = {
    "model": "convvit_tiny",
    "input_size": 32,
    "batch_size": 4,
    "epochs": 1,
    "warmup_epochs": 0,
    "lr": 1e-3,
    "num_workers": 0,
    "amp": "float32",
    "device": DEVICE,
}


def finetuning(data: Path, output: Path, **changes: Any) -> FinetuneConfig:
    given = {"data_path": str(data), "output_dir": str(output), "mixup": 0, "cutmix": 0}
    return FinetuneConfig(**(SHORT | given | changes))


def splits(folder: Path, train: Any, val: Any) -> Path:
    write_classes(folder / "train", train)
    write_classes(folder / "val", val)
    return folder


@pytest.mark.thorough
def test_every_file_of_weights_has_the_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = splits(tmp_path / "data", COLOURS.keys(), ["cat, or kitten"])
    run = tmp_path / "run"
    finetune(finetuning(data, run, nb_classes=5))
    text = capsys.readouterr().out
    assert "classes: 'ant', 'bee', 'cat, or kitten', 'the \"dog\"'" in text
    assert "no pictures of 3 of the 5 classes of its train split: 'ant', 'bee', " in text
    for file in (run, run / "best"):
        assert open_weights(file).classes == (*COLOURS, "unnamed 4")
    assert figures(run, data)["acc1"] in (0, 100 / 3, 200 / 3, 100)
    linprobe(LinprobeConfig(**SHORT, data_path=str(FASHION), output_dir=str(tmp_path / "probe")))
    classes = open_weights(tmp_path / "probe" / "best").classes
    assert isinstance(classes, ClassNumbers) and classes == tuple(map(str, range(10)))


def test_labels_of_val_are_those_of_train(tmp_path: Path) -> None:
    """`val` lacks the first two classes: labels by its own order would be 0 and 1."""
    data = splits(tmp_path / "data", COLOURS.keys(), ['the "dog"', "cat, or kitten"])
    task = Finetuning()
    task.build(finetuning(data, tmp_path / "run"), convmae.data.open_source(data))
    assert task.val is not None
    batches = task.val.evaluation_batches(convmae.data.EvalTransform((32, 32)), 6, workers=0)
    assert next(iter(batches)).labels.tolist() == [2, 2, 2, 3, 3, 3]


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (["ant", "bee"], ["ant", "cat, or kitten"], "its train split does not know 1: 'cat, or"),
        ({"ant": "ant", "Ant": "bee"}, {"ant ": "ant"}, "'ant ' differs from 'ant' by case or"),
        ({"\u00e9": "ant", "e\u0301": "bee"}, ["ant"], "have the same name, '\u00e9' .but for"),
    ],
)
def test_splits_that_do_not_fit(tmp_path: Path, train: Any, val: Any, message: str) -> None:
    data = splits(tmp_path / "data", train, val)
    with pytest.raises(OptionError, match=message):
        finetune(finetuning(data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_an_empty_class_folder_is_refused_in_training(tmp_path: Path) -> None:
    data = splits(tmp_path / "data", ["ant", "bee"], ["ant", "bee"])
    (data / "train" / "cow").mkdir()
    (data / "train" / "cow" / "notes.txt").write_text("to do")
    (data / "train" / ".cache").mkdir()
    with pytest.raises(OptionError, match=r"hold no picture .*: 'cow'; expected pictures of every"):
        finetune(finetuning(data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    shutil.rmtree(data / "train" / "cow")
    assert finetune(finetuning(data, tmp_path / "run")).steps == 1


def test_one_class_is_none(tmp_path: Path) -> None:
    """Such as a folder between the split and the classes."""
    data = splits(tmp_path / "data", ["ant"], ["ant"])
    with pytest.raises(OptionError, match="has 1 class: 'ant'; expected two at least, .* deeper"):
        finetune(finetuning(data, tmp_path / "run", batch_size=2))


# -- going on -------------------------------------------------------------------------------------


def test_a_run_goes_on_with_its_own_classes_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = splits(tmp_path / "data", COLOURS.keys(), ["ant"])
    run = tmp_path / "run"
    config = finetuning(data, run)
    finetune(config)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    more = dataclasses.replace(config, epochs=2, resume="auto", allow_changed_data=True)
    (data / "train" / "bee").rename(data / "train" / "wasp")
    with pytest.raises(OptionError, match=r"resume .* not know 1: 'wasp'; .* lacks 1: 'bee'"):
        finetune(more)
    shutil.rmtree(data / "train" / "wasp")
    for classes in (None, 4):
        with pytest.raises(OptionError, match=r"resume .* has 4 classes, .* lacks 1: 'bee'\. F"):
            finetune(dataclasses.replace(more, nb_classes=classes))
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    write_classes(data / "train", ["bee"])
    assert finetune(more).steps == 6
    assert open_weights(run).classes == tuple(COLOURS)


def test_a_run_goes_on_whatever_the_order_of_its_classes(tmp_path: Path) -> None:
    """The checkpoint's order holds: labels of training and of val follow it."""
    data = splits(tmp_path / "data", COLOURS.keys(), ["bee"])
    task, source = Finetuning(), convmae.data.open_source(data)
    config = finetuning(data, tmp_path / "run")
    task.build(config, source)
    weights = open_weights(save(tmp_path / "weights", ClassNames(UNSORTED)))
    (note,) = task.resume_classes(config, weights)
    assert "have the order that they have in" in note and task.classes == UNSORTED
    transform = convmae.data.EvalTransform((32, 32))
    (batch,) = source.evaluation_batches(transform, 12, workers=0)
    assert batch.labels.tolist() == [1] * 3 + [3] * 3 + [0] * 3 + [2] * 3
    assert task.val is not None
    (batch,) = task.val.evaluation_batches(transform, 3, workers=0)
    assert batch.labels.tolist() == [3] * 3


# -- finetuning again -----------------------------------------------------------------------------


@pytest.mark.parametrize("names", [list(COLOURS), ["bee", 'the "dog"']])
def test_a_head_is_kept_by_the_names_of_its_rows(
    perfect: Path, tmp_path: Path, names: list[str]
) -> None:
    data = splits(tmp_path / "data", names, names)
    task = Finetuning()
    config = finetuning(data, tmp_path / "run", finetune=str(perfect))
    model: Any
    model, _, notes = task.build(config, convmae.data.open_source(data))
    head = open_weights(perfect).state
    rows = [UNSORTED.index(name) for name in names]
    assert torch.equal(model.head.weight, head["head.weight"][rows])
    assert torch.equal(model.head.bias, head["head.bias"][rows])
    assert f"by the names of {len(names)} of its 4 classes" in "".join(notes)
    save_weights(tmp_path / "again", model, "convvit_tiny", None, IMAGENET, task.classes)
    assert figures(tmp_path / "again", data)["acc1"] == 100


@pytest.mark.parametrize("kind", ["other", "nameless", "numbers", "probe"])
def test_a_head_of_other_classes_is_fresh(perfect: Path, tmp_path: Path, kind: str) -> None:
    names = ["wolf", "ant", "bee", "cow"] if kind == "other" else list(COLOURS)
    data = splits(tmp_path / "data", dict(zip(names, COLOURS)), {names[0]: "ant"})
    classes = {"nameless": None, "numbers": ClassNumbers.of(4)}.get(kind, ClassNames(UNSORTED))
    weights = save(tmp_path / "weights", classes)
    common = {"data_path": str(data), "output_dir": str(tmp_path / "run")}
    config: Any = finetuning(data, tmp_path / "run", finetune=str(weights))
    task: Any = Finetuning()
    if kind == "probe":
        config = LinprobeConfig(**(SHORT | common), finetune=str(weights))
        task = Probing()
    model, _, notes = task.build(config, convmae.data.open_source(data))
    layer = model.head[1] if kind == "probe" else model.head
    assert float(layer.weight.detach().std()) < 0.02 and not layer.bias.any()
    why = {
        "other": "2 of the 4 classes are none of the 4 of the file: 'cow', 'wolf'",
        "nameless": "does not tell the names",
        "numbers": "has numbers in place of class names",
        "probe": "that of the file is of another kind",
    }[kind]
    assert "head: fresh, as " in "".join(notes) and why in "".join(notes)


def test_a_probe_of_other_classes_gives_its_encoder(tmp_path: Path) -> None:
    model: Any = convmae.create_model("convvit_tiny", img_size=32, num_classes=3, head_norm=True)
    save_weights(tmp_path, model, "convvit_tiny", None, IMAGENET, ClassNames("abc"))
    other: Any = convmae.create_model("convvit_tiny", img_size=32, num_classes=2, head_norm=True)
    report = load_pretrained(other, open_foreign(tmp_path), classes=ClassNames("cb"))
    assert report.keeps_head and torch.equal(other.head[1].weight, model.head[1].weight[[2, 1]])
    report = load_pretrained(other, open_foreign(tmp_path), classes=ClassNames("cx"))
    assert not report.keeps_head and "head.1.weight" in report.missing


# -- files ----------------------------------------------------------------------------------------


def test_names_survive_a_file_and_conversion(tmp_path: Path) -> None:
    from convmae import ConvertConfig, convert

    names = ClassNames(["a,b", 'c"d', "e\nf", "\u00e9\U0001f600", "\udce9", " "])
    save(tmp_path / "a", names, ["ant"] * 6)
    assert open_weights(tmp_path / "a").classes == names
    report = convert(ConvertConfig(str(tmp_path / "a"), str(tmp_path / "b")))
    assert open_weights(tmp_path / "b").classes == names and "cannot tell" not in str(report)
    report = convert(ConvertConfig(str(tmp_path / "a"), str(tmp_path / "c.pth")))
    assert "a .pth cannot tell the names of the 6 classes" in str(report)
    numbers = ClassNumbers.of(6)
    save(tmp_path / "e", numbers, ["ant"] * 6)
    classes = open_weights(tmp_path / "e").classes
    assert isinstance(classes, ClassNumbers) and classes == numbers
