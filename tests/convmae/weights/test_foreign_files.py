"""Files that are refused: code in them, damage, and files of something else."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import convmae
from convmae.config import OptionError, WeightsError, for_option
from convmae.weights.foreign import open_foreign
from convmae.weights.pretrained import load_pretrained
from tests.support.foreign_files import official, refused, run, save


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.target}'",)


@pytest.mark.parametrize("form", ["zip", "old", "pickle", "in args", "in the state dict"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, form: str) -> None:
    trap = tmp_path / "trap"
    file, evil = tmp_path / "evil.pth", Evil(trap)
    if form == "pickle":
        file.write_bytes(pickle.dumps(evil, protocol=2))
        assert pickle.loads(file.read_bytes()) == 0 and trap.exists()  # it is no dud
        trap.unlink()
    elif form == "in args":
        save(file, {"model": official(size=32), "args": argparse.Namespace(x=evil)})
    elif form == "in the state dict":
        save(file, official(size=32) | {"pos_embed": evil})
    else:
        save(file, {"model": evil}, _use_new_zipfile_serialization=form == "zip")
    for message in (refused(file), str(pytest.raises(WeightsError, load, file).value)):
        assert str(file) in message
        if form != "pickle":
            assert f"asks for {os.system.__module__}.system when it is read" in message
            assert "could run any code" in message
    assert not trap.exists()


def load(file: Path) -> None:
    load_pretrained(convmae.create_model("convvit_tiny", img_size=32), open_foreign(file))


def test_only_a_namespace_is_allowed(tmp_path: Path) -> None:
    file = save(tmp_path / "a.pth", {"model": official(size=32), "args": Path("x")})
    message = refused(file)
    assert "asks for pathlib" in message
    assert "expected tensors, plain containers and argparse.Namespace only" in message


JUNK = {
    "empty (0 bytes)": b"",
    "pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n",
    "web page (it begins with '<!DOCTYPE html>')": b"\n<!DOCTYPE html>\n<html>Sign in</html>",
    "neither a PyTorch file nor safetensors; it begins with": b"GIF89a, or anything at all",
    "not readable as safetensors": b"\xff\x00\x00\x00\x00\x00\x00\x00{" + b"}" * 20,
    "damaged or was not written by torch.save": b"\x80\x02garbage",
    "damaged or cut short": b"PK\x03\x04 and then nothing",
}


@pytest.mark.parametrize("finding", JUNK)
def test_junk_is_told_by_file_and_finding(tmp_path: Path, finding: str) -> None:
    file = tmp_path / "weights.pth"
    file.write_bytes(JUNK[finding])
    message = refused(file)
    assert message.startswith("checkpoint") and str(file) in message and finding in message
    with pytest.raises(WeightsError, match=re.escape(finding)):
        load(file)
    with pytest.raises(OptionError, match="^finetune: ") as error, for_option("finetune"):
        load(file)
    assert error.value.with_flags.startswith("--finetune: ")


VALUES = {
    "holds a list, expected a dictionary of tensors": lambda: [torch.ones(2)],
    "holds a Tensor, expected a dictionary": lambda: torch.ones(2),
    "holds no weights: expected tensors, or one of model,": lambda: {"epoch": 3, "loss": [1.0]},
    "found an empty dictionary": dict,
    "is not of a ConvMAE: it has no patch_embed1.proj.weight; it holds conv1": lambda: {
        "conv1": torch.ones(2)
    },
    "pos_embed is a str, expected a tensor": lambda: official(size=32) | {"pos_embed": "junk"},
    "pos_embed is a tensor of int64": lambda: (
        official(size=32) | {"pos_embed": torch.ones(1, 4, 256, dtype=torch.int64)}
    ),
    "pos_embed is a sparse or quantised": lambda: (
        official(size=32) | {"pos_embed": torch.ones(1, 4, 256).to_sparse()}
    ),
    "has no pos_embed": lambda: {k: v for k, v in official(size=32).items() if k != "pos_embed"},
    "holds pos_embed twice": lambda: (
        official(size=32) | {"module.pos_embed": torch.ones(1, 4, 256)}
    ),
    "patch_embed2.proj.weight has shape [3], expected 4 dimensions": lambda: (
        official(size=32) | {"patch_embed2.proj.weight": torch.ones(3)}
    ),
    "kernels [(4, 4), (2, 2), (4, 4)]": lambda: (
        official(size=32) | {"patch_embed3.proj.weight": torch.ones(256, 128, 4, 4)}
    ),
    "decoder_pred.bias of shape [7], but convmae_tiny takes [768]": lambda: (
        official(size=32) | {"decoder_pred.bias": torch.ones(7)}
    ),
}


SHAPES = {
    "decoder_pos_embed of 9 patches, but pos_embed of 2 x 2": ("decoder_pos_embed", (1, 9, 192)),
    "decoder_pos_embed has shape [4], expected 3": ("decoder_pos_embed", (4,)),
    "pos_embed has shape [1, 0, 5], expected 3": ("pos_embed", (1, 0, 5)),
    "head.weight has shape [], expected 2": ("head.weight", ()),
}


@pytest.mark.parametrize("finding", SHAPES)
def test_shapes_that_do_not_go_together(tmp_path: Path, finding: str) -> None:
    name, shape = SHAPES[finding]
    kind = "convvit" if name == "head.weight" else "convmae"
    state = official(f"{kind}_tiny", size=32) | {name: torch.ones(shape)}
    assert finding in refused(save(tmp_path / "a.pth", state), input_size=(32, 96))


def test_entries_of_files_that_have_none(tmp_path: Path) -> None:
    run(save(tmp_path / "a.pth", official(size=32)), tmp_path / "ours")
    message = "key 'model': .* is a folder, which has no entries"
    with pytest.raises(OptionError, match=message):
        run(tmp_path / "ours", tmp_path / "b.pth", key="model")
    with pytest.raises(OptionError, match=message.replace("folder", "safetensors file")):
        run(tmp_path / "ours" / "model.safetensors", tmp_path / "b.pth", key="model")


@pytest.mark.parametrize("finding", VALUES)
def test_files_of_something_else(tmp_path: Path, finding: str) -> None:
    assert finding in refused(save(tmp_path / "a.pth", VALUES[finding]()))


def test_files_cut_short_or_with_a_changed_byte(tmp_path: Path) -> None:
    file = save(tmp_path / "a.pth", {"model": official(size=32)})
    whole = file.read_bytes()
    for length in (3, 100, len(whole) // 2, len(whole) - 30):
        file.write_bytes(whole[:length])
        assert "damaged" in refused(file)
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    file.write_bytes(changed)
    torch.load(file, weights_only=True)  # PyTorch does not notice
    assert "Bad CRC-32" in refused(file)


def test_archives_that_torch_did_not_write(tmp_path: Path) -> None:
    good = save(tmp_path / "good.pth", {"model": official(size=32)})
    file = tmp_path / "bad.pth"
    for name in ("../../outside", "/etc/outside", "a\\..\\..\\outside", "C:outside"):
        with zipfile.ZipFile(good) as source, zipfile.ZipFile(file, "w") as target:
            for member in source.infolist():
                target.writestr(member, source.read(member))
            target.writestr(name, b"x")
        assert "a path out of the archive" in refused(file)
    with zipfile.ZipFile(file, "w") as target:
        target.writestr("readme.txt", "hello")
    assert "it has no data.pkl; it holds readme.txt" in refused(file)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("a/data.pkl", bytes(1000))
    assert "is compressed" in refused(file)
    torch.serialization.set_crc32_options(False)
    try:
        save(file, {"model": official(size=32)})
    finally:
        torch.serialization.set_crc32_options(True)
    assert run(file, tmp_path / "a.safetensors").missing == []
