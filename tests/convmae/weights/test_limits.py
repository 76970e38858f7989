"""What a file announces is refused in one line, before memory or time is taken."""

from __future__ import annotations

import json
import re
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

import convmae
from convmae.config import OptionError, WeightsError
from convmae.weights import checkpoint as checkpoints
from convmae.weights.digest import with_digest
from convmae.weights.foreign import open_foreign
from convmae.weights.header import MOST_HEADER, strict_json
from tests.support.foreign_files import official, run, save

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytest.importorskip("safetensors")
SMALL: dict[str, Any] = {"embed_dim": [16, 16, 32], "depth": [1, 1, 1], "num_heads": 2}
DECODER = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
HUGE = 10**9
SECONDS = 10.0  # far more than any of them needs, far less than building such a model


def refused(load: Callable[[], Any]) -> str:
    """The message of the error; it came quickly, and is one line."""
    began = time.monotonic()
    with pytest.raises(WeightsError) as error:
        load()
    assert time.monotonic() - began < SECONDS
    message = str(error.value)
    assert "\n" not in message and len(message) < 1000
    return message


def write(file: Path, name: str = "convmae_tiny", digest: bool = True, **changes: Any) -> Path:
    """A file whose configuration has these changes, by one who knows how to make a digest."""
    from safetensors.torch import save_file

    sizes = SMALL | DECODER if name.startswith("convmae") else SMALL | {"num_classes": 5}
    model = convmae.create_model(name, img_size=32, **{k: _tuple(v) for k, v in sizes.items()})
    config = json.dumps(model.config | changes)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    metadata = {"format": "pt", "model": name, "config": config}
    save_file(state, file, metadata=with_digest(metadata, state) if digest else metadata)
    return file


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "depth": ({"depth": [HUGE, 1, 1]}, r"has depth \[1000000000, 1, 1\].*of \[1, 1, 1\] blocks"),
    "decoder_depth": ({"decoder_depth": HUGE}, "decoder_depth 1000000000.* of 1 blocks"),
    "depth as a float": ({"depth": [1e9, 1, 1]}, r"has depth \[1000000000.0, 1, 1\], expected thr"),
    "depth beyond": ({"depth": [10**30, 1, 1]}, "has depth .* expected three whole numbers below"),
    "negative": ({"depth": [-1, 1, 1]}, "has depth .* expected three whole numbers"),
    "embed_dim": ({"embed_dim": [16, 16, 2 * HUGE]}, "has shape|does not fit"),
    "img_size": ({"img_size": 1600000000}, r"pos_embed has shape \[1, 4, 32\]|does not fit"),
    "img_size odd": ({"img_size": [33, 32]}, "img_size must be a positive multiple of 16"),
    "img_size text": ({"img_size": "abc"}, "img_size 'abc', expected one or two whole numbers"),
    "in_chans": ({"in_chans": HUGE}, "patch_embed1.proj.weight has shape|does not fit"),
    "heads": ({"num_heads": HUGE}, "must be a multiple of num_heads"),
    "heads 0": ({"num_heads": 0}, "num_heads must be a positive whole number, got 0"),
    "heads true": ({"num_heads": True}, "num_heads True, expected a whole number"),
    "mlp_ratio": ({"mlp_ratio": [4, 4, "4"]}, "mlp_ratio .* expected three finite numbers"),
    "mlp_ratio large": ({"mlp_ratio": [4, 4, 1e300]}, "mlp_ratio .* expected three finite"),
    "mlp_ratio 1e8": ({"mlp_ratio": [4, 4, 1e8]}, "has shape"),
    "text for bool": ({"norm_pix_loss": "yes"}, "norm_pix_loss 'yes', expected true or false"),
    "unknown": ({"wings": 2}, "has 'wings' in the configuration .* takes img_size, in_chans"),
    "long": ({"img_size": "9" * 100_000}, r"img_size '999.*\.\.\., expected"),
}


@pytest.mark.parametrize("what", BAD)
def test_absurd_configurations(tmp_path: Path, what: str) -> None:
    changes, expected = BAD[what]
    file = write(tmp_path / "a.safetensors", **changes)
    message = refused(lambda: convmae.load_model(file))
    assert str(file) in message
    assert re.search(expected, message), message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_classes": HUGE}, r"head.weight has shape \[5, 32\], .* has \[1000000000, 32\]"),
        ({"num_classes": -3}, "num_classes -3, expected a whole number"),
        ({"global_pool": {}}, "global_pool {}, expected true, false or a text"),
        ({"drop_path_rate": "a"}, "drop_path_rate 'a', expected a finite number"),
        ({"head_norm": True}, "lacks head.0.running_mean|lacks head"),
    ],
)
def test_absurd_classifiers(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    file = write(tmp_path / "a.safetensors", "convvit_tiny", **changes)
    message = refused(lambda: convmae.load_model(file))
    assert str(file) in message and re.search(expected, message), message


@pytest.mark.parametrize(
    ("entry", "text", "expected"),
    [
        ("config", "[" * 200_000, "'config': lists or dictionaries are nested too deeply"),
        ("config", '{"a":' * 200_000, "'config': lists or dictionaries are nested too deeply"),
        ("config", '{"depth": [1, 1, 1], "depth": [9, 9, 9]}', "'config': 'depth' is there twice"),
        ("config", '{"drop_path_rate": NaN}', "'config': NaN is no finite number"),
        ("config", '{"mlp_ratio": [4, 4, 1e999]}', "mlp_ratio .* expected three finite numbers"),
        ("config", '{"depth": ' + "9" * 100_000 + "}", "damaged|depth"),
        ("config", " " * (17 << 20) + "{}", "'config' has 17825794 characters, expected at most"),
        ("mean", "[NaN, 0, 0]", "'mean': NaN is no finite number"),
        ("mean", '"123"', "'mean' is 123, expected finite numbers"),
        ("mean", '["0.5", 0.5, 0.5]', "'mean' is .* expected finite numbers"),
        ("std", "[0.2, 0.2, 0]", "'std' is .* expected finite numbers"),
        ("std", "[1e999, 1, 1]", "'std' is .* expected finite numbers"),
        ("std", "[]", "'std' is .* expected finite numbers"),
        ("std", "[1, 1]", "mean, deviation and in_chans are not of the same channels"),
        ("config", '{"in_chans": 2}', "mean, deviation and in_chans are not of the same channels"),
        ("config", '{"in_chans": [2]}', "metadata of .* are damaged"),
        ("model", "convmae_gigantic", "is of model 'convmae_gigantic', which there is not"),
    ],
)
def test_absurd_metadata(tmp_path: Path, entry: str, text: str, expected: str) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "a.safetensors"
    metadata = {"model": "convmae_tiny", "config": "{}", "mean": "[0, 0, 0]", "std": "[1, 1, 1]"}
    save_file({"x": torch.ones(1)}, file, metadata=metadata | {entry: text})
    for load in (convmae.open_weights, open_foreign):
        message = refused(lambda load=load: load(file))  # type: ignore[misc]
        assert str(file) in message and re.search(expected, message), message


def header_file(file: Path, header: bytes, data: bytes = b"") -> Path:
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return file


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"__metadata__": {"a": "1", "a": "2"}}', "'a' is there twice"),
        (b'{"__metadata__": {}, "__metadata__": {}}', "'__metadata__' is there twice"),
        (b'{"__metadata__": {"a": 1}}', "no dictionary with __metadata__ of texts"),
        (b'{"__metadata__": []}', "no dictionary with __metadata__ of texts"),
        (b"{}{}", "not readable as safetensors"),
        (
            b'{"x":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}',
            "not readable as safetensors",
        ),
        (
            b'{"x":{"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,4]}}',
            "not readable as safetensors",
        ),
        (b'{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,4]}}', "not readable as safetensors"),
    ],
)
def test_absurd_headers(tmp_path: Path, header: bytes, expected: str) -> None:
    file = header_file(tmp_path / "a.safetensors", header, bytes(4))
    for load in (convmae.open_weights, open_foreign):
        message = refused(lambda load=load: load(file))  # type: ignore[misc]
        assert str(file) in message and expected in message


def test_headers_longer_than_the_file_or_than_any(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes((1 << 39).to_bytes(8, "little") + b"{}")
    message = refused(lambda: convmae.open_weights(file))
    assert "its header has 549755813888 bytes, but the file has 10 in all" in message
    with file.open("wb") as opened:
        opened.write((MOST_HEADER + 1).to_bytes(8, "little") + b"{")
        opened.truncate(MOST_HEADER + 100)  # a hole: takes no space
    assert "expected at most 67108864" in refused(lambda: open_foreign(file))


@pytest.mark.parametrize("name", ["blocks1.999999999.norm1.weight", "blocks3.4.norm1.weight"])
def test_numbers_of_blocks_that_are_not_there(tmp_path: Path, name: str) -> None:
    state = official(size=32)
    del state["blocks3.3.norm1.weight"]
    state = {k: v for k, v in state.items() if not k.startswith("blocks3.3.")}
    state[name] = torch.ones(64)
    file = save(tmp_path / "a.pth", state)
    began = time.monotonic()
    with pytest.raises(OptionError, match=r"modules blocks[13]\.\*, but none of blocks[13]"):
        run(file, tmp_path / "out.safetensors")
    assert time.monotonic() - began < SECONDS and not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("digits", ["9" * 5000, "٣"])
def test_numbers_of_blocks_that_are_no_numbers(tmp_path: Path, digits: str) -> None:
    state = official(size=32) | {f"blocks1.{digits}.norm1.weight": torch.ones(64)}
    with pytest.raises(OptionError, match=r"modules blocks1\.\*, but none of blocks1\.2"):
        run(save(tmp_path / "a.pth", state), tmp_path / "out.safetensors")


def test_a_shape_larger_than_its_values(tmp_path: Path) -> None:
    """A stride of 0 makes 4 bytes look like terabytes."""
    state = official(size=32)
    state["mask_token"] = torch.ones(1).expand(1, 1, 10**12)
    file = save(tmp_path / "a.pth", state)
    message = refused(lambda: open_foreign(file))
    assert "mask_token is a tensor of shape [1, 1, 1000000000000] with values for a part" in message


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"step": "3"}, "has step '3', expected a whole number"),
        ({"step": float("nan")}, "has step nan, expected a whole number"),
        ({"steps_per_epoch": 0}, "has steps_per_epoch 0, expected a positive whole number"),
        (
            {"losses": [1.0, float("inf")]},
            r"has losses \[1.0, inf\], expected a list of fin",
        ),
        ({"options": [1]}, r"has options \[1\], expected a dictionary"),
        (
            {"optimizer": {"state": [{"exp_avg": torch.ones(1).expand(10**12)}]}},
            r"optimizer.state\[0\].exp_avg is a tensor of shape \[1000000000000\] with values",
        ),
    ],
)
def test_absurd_training_states(tmp_path: Path, entry: dict[str, Any], expected: str) -> None:
    model = convmae.create_model("convmae_tiny", img_size=32)
    checkpoints.save_checkpoint(tmp_path, model, "convmae_tiny", entry)
    message = refused(lambda: checkpoints.read_training_state(tmp_path))
    assert "training_state.pt" in message and re.search(expected, message), message


def test_options_of_other_code_that_are_of_no_kind(tmp_path: Path) -> None:
    import argparse

    options = argparse.Namespace(norm_pix_loss=torch.zeros(3))
    file = save(tmp_path / "a.pth", {"model": official(size=32), "args": options})
    report = run(file, tmp_path / "out.safetensors")
    assert report.config["norm_pix_loss"] is False


def test_a_configuration_on_the_way_to_a_classifier(tmp_path: Path) -> None:
    """What is read of it by finetune and convert is checked as well."""
    file = write(tmp_path / "a.safetensors", img_size="abc")
    assert "img_size 'abc'" in refused(lambda: open_foreign(file))
    file = write(tmp_path / "a.safetensors", num_heads=7)
    with pytest.raises(OptionError, match="must be a multiple of num_heads = 7"):
        run(file, tmp_path / "out.safetensors")


def test_strict_json() -> None:
    assert strict_json('{"a": [1, 2.5, null, true, "x"]}') == {"a": [1, 2.5, None, True, "x"]}
    for text, expected in (
        ('{"a": Infinity}', "Infinity is no finite number"),
        ('[{"a": 1, "b": 2, "a": 3}]', "'a' is there twice"),
        ("[" * 100_000, "nested too deeply"),
    ):
        with pytest.raises(ValueError, match=expected):
            strict_json(text)


def test_a_checkpoint_as_deep_as_its_file_is_read(tmp_path: Path) -> None:
    """The other side of the limits: unusual sizes that the tensors have are fine."""
    model = convmae.create_model(
        "convvit_tiny", img_size=(16, 160), depth=(3, 1, 40), embed_dim=(8, 8, 8), num_heads=2
    )
    file = checkpoints.save_weights(tmp_path, model, "convvit_tiny")
    again = convmae.load_model(file)
    assert again.config == model.config
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())


def test_a_loaded_model_is_one_as_built(tmp_path: Path) -> None:
    """Float32, trainable where it was, and nothing of it is shared with what was read."""
    built = convmae.create_model("convmae_tiny", img_size=32)
    half = {key: value.half() for key, value in built.state_dict().items()}
    checkpoints.save_weights(tmp_path, built, "convmae_tiny", half)
    weights = convmae.open_weights(tmp_path)
    model = weights.build_model()
    expected = [(n, p.dtype, p.requires_grad) for n, p in built.named_parameters()]
    assert [(n, p.dtype, p.requires_grad) for n, p in model.named_parameters()] == expected
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    assert all(torch.equal(weights.state[key], half[key]) for key in half)
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])
    model(torch.randn(1, 3, 32, 32)).loss.backward()
