"""What a run left, in one's own code: weights are opened once, with all that they say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import safetensors
import torch

import convmae
from convmae.config import (
    ConvertConfig,
    EvaluateConfig,
    OptionError,
    PretrainConfig,
    ReconstructConfig,
)
from convmae.data import Statistics
from convmae.weights import checkpoint as checkpoints
from tests.support.paths import ROOT
from tests.support.training_runs import DEVICE, folder_of

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("torchvision")
SHORT = {
    "input_size": 32,
    "batch_size": 4,
    "epochs": 1,
    "warmup_epochs": 0,
    "num_workers": 0,
    "amp": "float32",
    "device": DEVICE,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretraining, and a classifier of cats and dogs that began with it."""
    root = tmp_path_factory.mktemp("runs")
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            folder_of(root / "data" / split / name, 4)
    convmae.pretrain(
        PretrainConfig(
            model="convmae_tiny",
            data_path=str(root / "data" / "train"),
            output_dir=str(root / "mine"),
            mean=(0.4, 0.5, 0.6),
            std=(0.2, 0.3, 0.4),
            **SHORT,
        )
    )
    convmae.finetune(
        convmae.FinetuneConfig(
            data_path=str(root / "data"),
            output_dir=str(root / "classifier"),
            finetune=str(root / "mine"),
            **SHORT,
        )
    )
    return root


def count_openings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    opened: list[str] = []
    safe_open = safetensors.safe_open

    def noting(path: Path, *args: object, **options: object) -> object:
        opened.append(str(path))
        return safe_open(path, *args, **options)

    monkeypatch.setattr(safetensors, "safe_open", noting)
    return opened


@pytest.mark.parametrize("name", ["", "checkpoint", "checkpoint/model.safetensors"])
def test_every_name_of_a_checkpoint(runs: Path, name: str) -> None:
    model = convmae.load_model(runs / "mine" / name)
    assert isinstance(model, convmae.ConvMAE) and not model.training
    assert convmae.open_weights(runs / "mine" / name).model == "convmae_tiny"


def test_a_converted_file(runs: Path, tmp_path: Path) -> None:
    official, ours = tmp_path / "official.pth", tmp_path / "ours.safetensors"
    convmae.convert(ConvertConfig(str(runs / "mine"), str(official)))
    convmae.convert(ConvertConfig(str(official), str(ours), kind="convmae"))
    with pytest.raises(convmae.WeightsError, match="convert` makes one of other files of weights"):
        convmae.load_model(official)
    found, expected = (convmae.load_model(p).state_dict() for p in (ours, runs / "mine"))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_statistics_and_classes_travel_with_the_weights(runs: Path) -> None:
    pretrained, best = (convmae.open_weights(runs / n) for n in ("mine", "classifier/best"))
    assert pretrained.statistics == Statistics((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    assert best.statistics == pretrained.statistics  # taken over by finetuning
    assert (pretrained.classes, best.classes) == (None, ("cat", "dog"))
    assert convmae.open_weights(runs / "classifier").classes == ("cat", "dog")


def test_the_lines_of_the_readme(runs: Path) -> None:
    """As they stand there and in docs/training.md, on another folder and smaller pictures."""
    blocks = {
        block
        for file in ("README.md", "docs/training.md")
        for block in (ROOT / file).read_text().split("```python\n")
        if "convmae.open_weights(" in block
    }
    (code,) = {block.partition("```")[0] for block in blocks}
    names: dict[str, Any] = {}
    exec(code.replace('"runs/', f'"{runs}/').replace("224", "32"), names)
    assert names["scores"].shape == (2, 2) and bool(names["scores"].isfinite().all())
    assert set(names["classes"]) <= {"cat", "dog"}


def test_the_lines_about_models_alone(runs: Path) -> None:
    """As they stand in README.md and docs/training.md, on another folder and a smaller model."""
    texts = [(ROOT / file).read_text() for file in ("README.md", "docs/training.md")]
    blocks = {block for text in texts for block in text.split("```python\n")[1:]}
    codes = {block.partition("```")[0] for block in blocks if "convmae.load_model(" in block}
    (code,) = codes
    names: dict[str, Any] = {"convmae": convmae}
    code = code.replace('"runs/', f'"{runs}/').replace("convvit_base", "convvit_tiny")
    with pytest.warns(convmae.WeightsWarning, match="3 -> 1 channels, their sum"):
        exec(code, names)
    model, grey, classifier = (names[name] for name in ("model", "grey", "classifier"))
    assert isinstance(model, convmae.ConvMAE) and grey.config["img_size"] == [192, 256]
    assert grey.in_chans == 1 and classifier.head.weight.shape == (10, 256)
    expected = model.state_dict()["blocks3.3.attn.qkv.weight"]
    for other in (grey, classifier):
        assert torch.equal(other.state_dict()["blocks3.3.attn.qkv.weight"], expected)


def test_each_command_opens_its_file_once(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = count_openings(monkeypatch)
    data = str(runs / "data")
    convmae.evaluate(EvaluateConfig(str(runs / "classifier"), data, device=DEVICE))
    assert opened == [str(runs / "classifier" / "checkpoint" / "model.safetensors")]
    opened.clear()
    picture = tmp_path / "out.png"
    convmae.reconstruct(
        ReconstructConfig(str(runs / "mine"), (data + "/train/cat",), str(picture), device=DEVICE)
    )
    assert len(opened) == 1 and picture.is_file()
    opened.clear()
    convmae.finetune(
        convmae.FinetuneConfig(
            data_path=data,
            output_dir=str(tmp_path / "run"),
            finetune=str(runs / "mine"),
            **SHORT,
        )
    )
    assert len(opened) == 1


def test_the_library_speaks_of_arguments_and_the_command_line_of_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from convmae.cli import main

    nowhere = str(tmp_path / "nowhere")
    with pytest.raises(convmae.WeightsError, match=f"^path '{nowhere}' does not exist; expected"):
        convmae.load_model(nowhere)
    with pytest.raises(OptionError, match=f"^checkpoint '{nowhere}' does not exist; expected"):
        convmae.evaluate(EvaluateConfig(nowhere, nowhere, device=DEVICE))
    assert main(["evaluate", "--checkpoint", nowhere, "--data_path", nowhere]) == 2
    assert f"convmae: error: --checkpoint '{nowhere}' does not exist" in capsys.readouterr().err
    with pytest.raises(OptionError, match=r"^mask_ratio must be in \[0, 1\), got 2"):
        convmae.pretrain(PretrainConfig(mask_ratio=2))
    assert main(["pretrain", "--mask_ratio", "2"]) == 2
    assert "convmae: error: --mask_ratio must be in [0, 1), got 2" in capsys.readouterr().err
    with pytest.raises(convmae.DataError, match=f"^data_path '{nowhere}' does not exist"):
        convmae.pretrain(PretrainConfig(data_path=nowhere, output_dir=str(tmp_path / "run")))


def test_hyphens_that_are_no_flags_stay() -> None:
    error = OptionError("--a_b: 2--3, x-- y, well--known, (--c), --d=1, -- e; type `x --f 1`")
    assert str(error) == "a_b: 2--3, x-- y, well--known, (c), d=1, -- e; type `x --f 1`"
    assert error.with_flags.startswith("--a_b: 2--3") and isinstance(error, ValueError)


class Refused(torch.utils.data.Dataset):
    def __getitems__(self, keys: list[int]) -> None:
        raise convmae.DataError("--data_path is refused")

    def __len__(self) -> int:
        return 2


def test_errors_of_loading_processes_keep_their_flags() -> None:
    from convmae.data.loader import run_batches

    with pytest.raises(convmae.DataError) as error:
        list(run_batches(Refused(), [[0]], workers=1, pin=False))
    assert error.value.with_flags == "--data_path is refused"
    assert str(error.value) == "data_path is refused"


@pytest.mark.parametrize("classes", ["3", '[["a"]', "{"])
def test_damaged_class_names(tmp_path: Path, classes: str) -> None:
    file = tmp_path / "model.safetensors"
    model = convmae.create_model("convvit_tiny", img_size=32, num_classes=2)
    checkpoints.write_weights(file, "convvit_tiny", model.config, model.state_dict())
    state = convmae.open_weights(file).state
    metadata = {"model": "convvit_tiny", "config": "{}", "classes": classes}
    from safetensors.torch import save_file

    save_file(state, file, metadata=metadata)
    with pytest.raises(convmae.WeightsError, match="metadata of .* are damaged"):
        convmae.open_weights(file)
