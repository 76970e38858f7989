"""A changed bit, a byte more or less: no way of loading takes such a file."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import convmae
from convmae.config import (
    ConvertConfig,
    EvaluateConfig,
    FinetuneConfig,
    OptionError,
    PretrainConfig,
    ReconstructConfig,
    WeightsError,
    WeightsWarning,
)
from convmae.weights import checkpoint as checkpoints
from convmae.weights.digest import DIGEST, MARK, STATE_DIGEST, content_digest
from convmae.weights.foreign import open_foreign
from tests.support.foreign_files import run
from tests.support.training_runs import DEVICE, folder_of

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest.importorskip("safetensors")
FLIPS = 30
SMALL: dict[str, Any] = {"embed_dim": (16, 16, 32), "depth": (1, 1, 1), "num_heads": 2}
DECODER = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A run's folder with a small checkpoint and best weights."""
    model = convmae.create_model("convmae_tiny", img_size=32, **SMALL, **DECODER)
    state = {"step": 1, "optimizer": {"exp_avg": torch.rand(5000)}, "options": {"blr": 1e-3}}
    checkpoints.save_checkpoint(
        tmp_path, model, "convmae_tiny", state, pictures=checkpoints.IMAGENET, classes=["a", "b"]
    )
    return tmp_path


def flipped(whole: bytes, begin: int, end: int, count: int = FLIPS) -> Iterator[bytes]:
    """The bytes with one bit changed, at random places from `begin` to `end`."""
    draw = random.Random(begin + end)
    for _ in range(count):
        changed = bytearray(whole)
        changed[draw.randrange(begin, end)] ^= 1 << draw.randrange(8)
        yield bytes(changed)


def parts(whole: bytes) -> dict[str, tuple[int, int]]:
    """Where the parts of a safetensors file are."""
    end = 8 + int.from_bytes(whole[:8], "little")
    metadata = whole.index(b'"__metadata__"')
    assert len(json.loads(whole[8:end])["__metadata__"]) == 9
    return {
        "length": (0, 8),
        "metadata": (metadata, metadata + 400),
        "header": (8, end),
        "data": (end, len(whole)),
    }


@pytest.mark.parametrize("part", ["length", "metadata", "header", "data"])
def test_every_flipped_bit_of_the_weights_is_found(saved: Path, part: str) -> None:
    file = saved / "checkpoint" / checkpoints.WEIGHTS
    whole = file.read_bytes()
    for changed in flipped(whole, *parts(whole)[part]):
        file.write_bytes(changed)
        for load in (convmae.open_weights, convmae.load_model, open_foreign):
            with pytest.raises(WeightsError) as error:
                load(file)
            assert str(file) in str(error.value) and "\n" not in str(error.value)
        with pytest.raises(WeightsError):
            checkpoints.read_training_state(saved)
    file.write_bytes(whole)
    convmae.load_model(saved)


@pytest.mark.parametrize("word", [DIGEST, MARK, STATE_DIGEST, "model", "config", "__metadata__"])
@pytest.mark.thorough(but_every=5)
def test_every_flipped_bit_of_the_names_of_the_digest_is_found(saved: Path, word: str) -> None:
    """Not even those that make a file look like one of an earlier version."""
    file = saved / "checkpoint" / checkpoints.WEIGHTS
    whole = file.read_bytes()
    begin = whole.index(f'"{word}":'.encode()) + 1
    for place in range(begin, begin + len(word)):
        for bit in range(8):
            changed = bytearray(whole)
            changed[place] ^= 1 << bit
            file.write_bytes(changed)
            for load in (convmae.open_weights, open_foreign):
                with pytest.raises(WeightsError):
                    load(file)


def test_every_flipped_bit_of_the_training_state_is_found(saved: Path) -> None:
    file = saved / "checkpoint" / checkpoints.STATE
    whole = file.read_bytes()
    thirds = [round(len(whole) * share / 3) for share in range(4)]
    for begin, end in zip(thirds, thirds[1:], strict=False):
        for changed in flipped(whole, begin, end):
            file.write_bytes(changed)
            with pytest.raises(WeightsError, match=r"^/.*training_state.pt is damaged, or not of"):
                checkpoints.read_training_state(saved)
    file.write_bytes(whole)
    assert checkpoints.read_training_state(saved)[1]["step"] == 1


@pytest.mark.parametrize("name", [checkpoints.WEIGHTS, checkpoints.STATE])
def test_bytes_more_or_less(saved: Path, name: str) -> None:
    file = saved / "checkpoint" / name
    whole = file.read_bytes()
    for changed in (whole + b"\0", whole[:-1], whole[: len(whole) // 2], whole[:9], b"", b"x" * 9):
        file.write_bytes(changed)
        with pytest.raises(WeightsError, match=name):
            checkpoints.read_training_state(saved)
        if name == checkpoints.WEIGHTS:
            for load in (convmae.load_model, open_foreign):
                with pytest.raises(WeightsError, match=name):
                    load(file)


def test_a_training_state_of_another_step_does_not_pass(saved: Path, tmp_path: Path) -> None:
    file = saved / "checkpoint" / checkpoints.STATE
    before = file.read_bytes()
    model = convmae.create_model("convmae_tiny", img_size=32, **SMALL, **DECODER)
    checkpoints.save_checkpoint(saved, model, "convmae_tiny", {"step": 2})
    assert checkpoints.read_training_state(saved)[1] == {"step": 2}
    file.write_bytes(before)
    with pytest.raises(WeightsError, match="not of the same checkpoint as the weights beside it"):
        checkpoints.read_training_state(saved)


def test_no_command_takes_a_changed_bit(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            folder_of(tmp_path / "data" / split / name, 4)
    data, short = str(tmp_path / "data"), {"input_size": 32, "batch_size": 4, "num_workers": 0}
    short |= {"epochs": 1, "warmup_epochs": 0, "device": DEVICE, "amp": "float32"}
    mine, classifier = str(tmp_path / "mine"), str(tmp_path / "classifier")
    pretrain = PretrainConfig(model="convmae_tiny", data_path=data, output_dir=mine, **short)
    convmae.pretrain(pretrain)
    finetune = FinetuneConfig(data_path=data, output_dir=classifier, finetune=mine, **short)
    convmae.finetune(finetune)
    for folder in (mine, f"{classifier}/best"):
        base = Path(folder) / ("checkpoint" if folder == mine else "")
        file = base / checkpoints.WEIGHTS
        whole = bytearray(file.read_bytes())
        whole[-1000] ^= 4
        file.write_bytes(whole)
    resumed = {**short, "epochs": 2, "resume": "auto"}
    calls = [
        lambda: convmae.pretrain(
            PretrainConfig(model="convmae_tiny", data_path=data, output_dir=mine, **resumed)
        ),
        lambda: convmae.pretrain(
            PretrainConfig(
                model="convmae_tiny", data_path=data, output_dir=f"{mine}2", init=mine, **short
            )
        ),
        lambda: convmae.finetune(
            FinetuneConfig(data_path=data, output_dir=f"{classifier}2", finetune=mine, **short)
        ),
        lambda: convmae.evaluate(EvaluateConfig(f"{classifier}/best", data, device=DEVICE)),
        lambda: convmae.reconstruct(
            ReconstructConfig(mine, (f"{data}/train/cat",), str(tmp_path / "a.png"), device=DEVICE)
        ),
        lambda: convmae.convert(ConvertConfig(mine, str(tmp_path / "out.pth"))),
    ]
    for call in calls:
        with pytest.raises(OptionError, match=r"model.safetensors is damaged, or another program"):
            call()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"data", "mine", "classifier"}  # nothing was begun


def test_a_file_changed_on_purpose_has_a_way_out(saved: Path, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    file = saved / "checkpoint" / checkpoints.WEIGHTS
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    state = load_file(file)  # as timm and others read it
    save_file(dict(reversed(state.items())), file, metadata=metadata)
    convmae.load_model(file)  # written again without a change: the digest holds
    state["mask_token"] = state["mask_token"] + 1
    save_file(state, file, metadata=metadata)
    with pytest.raises(WeightsError, match="`convmae convert --ignore_digest` writes it anew"):
        convmae.load_model(file)
    out = tmp_path / "anew.safetensors"
    run(file, out, ignore_digest=True)
    assert torch.equal(convmae.load_model(out).mask_token, state["mask_token"])
    save_file(state, file)  # metadata lost: weights of unknown origin
    with pytest.raises(WeightsError, match="does not name its model.*`convmae convert` writes one"):
        convmae.open_weights(file)
    assert open_foreign(file).ours is None


def test_files_without_a_digest_are_read_and_told_of_once(saved: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    file = saved / "checkpoint" / checkpoints.WEIGHTS
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    old = {k: v for k, v in metadata.items() if k not in (DIGEST, MARK, STATE_DIGEST)}
    state = load_file(file)
    save_file(state, file, metadata=old)
    for load in (convmae.load_model, open_foreign, checkpoints.read_training_state):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            load(saved)
        assert [entry.category for entry in said] == [WeightsWarning]
        assert "has no digest, as an earlier version wrote it" in str(said[0].message)


def test_what_a_digest_is_of() -> None:
    tensors = {"a": torch.arange(6.0), "b": torch.zeros(2, dtype=torch.bfloat16)}
    metadata = {"model": "x", "config": "{}"}
    found = content_digest(metadata, tensors)
    assert found.startswith("sha256:") and len(found) == 71
    others = dict(reversed(tensors.items())), dict(reversed(metadata.items()))
    assert content_digest(others[1], others[0]) == found
    assert content_digest({**metadata, DIGEST: "any"}, tensors) == found
    for changed in (
        {**tensors, "a": tensors["a"].view(2, 3)},
        {**tensors, "a": tensors["a"].view(torch.int32)},
        {"a": tensors["a"], "c": tensors["b"]},
        {"a": tensors["a"]},
        {**tensors, "b": torch.zeros(2, dtype=torch.float16)},
    ):
        assert content_digest(metadata, changed) != found
    assert content_digest({**metadata, "config": "{ }"}, tensors) != found
