"""Official segmenters and detectors become ours and go back, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import convmae
from convmae import ConvertConfig, OptionError, convert, create_model
from convmae.data import IMAGENET
from convmae.data.classes import ClassNames
from convmae.models.dense_tasks.official_names import official_names
from convmae.weights.checkpoint import save_weights
from convmae.weights.dense_conversion import dense_weights
from convmae.weights.foreign import ForeignWeights
from tests.convmae.weights.test_dense_names import SMALL, filled
from tests.support.paths import GOLDEN

if TYPE_CHECKING:
    from torch import Tensor

pytest.importorskip("torchvision")

HEADS: dict[str, dict[str, Any]] = {
    "segmentation": {"head": "upernet", "head_width": 12, "aux_width": 8, "num_classes": 3},
    "detection": {
        **{"kind": "detection", "window_size": 2, "width": 8, "box_features": 16},
        **{"box_convs": 2, "mask_convs": 1, "num_classes": 4},
    },
    "vitdet": {
        **{"kind": "vitdet", "window_size": 3, "global_blocks": [0], "width": 8},
        **{"box_features": 16, "masks": False, "rpn_convs": 1, "num_classes": 4},
    },
}
NAMES = {kind: ("segment:" if kind == "segmentation" else "detect:") for kind in HEADS}
KEYS = {
    "keys_segmentation_base_512": "segmentation",
    "keys_convvitdet_base_mask_rcnn_1024": "detection",
    "keys_vitdet_base_mask_rcnn": "vitdet",
}


def small(kind: str, **changes: Any) -> Any:
    size = 96 if kind == "segmentation" else 64
    options = HEADS[kind] | {"img_size": (size, size)} | SMALL | changes
    return filled(create_model(f"{NAMES[kind]}convvit_tiny", **options))


def official(kind: str, model: Any) -> dict[str, Any]:
    """A file as the official code writes it, made from a model by names alone."""
    state: dict[str, Tensor] = dict(model.state_dict())
    if kind == "segmentation":
        index = torch.arange(36)[:, None] * 0 + torch.arange(36)  # of any values: it is not read
        state |= {f"backbone.blocks3.{i}.attn.relative_position_index": index for i in range(2)}
        meta = {"CLASSES": ("wall", "sky", "tree"), "mmseg_version": "0.11.0"}
        return {"meta": meta, "state_dict": state, "optimizer": {"state": {}}}
    names = official_names(state, kind)
    return {
        "model": {names[key]: value for key, value in state.items()},
        "iteration": 3,
        "optimizer": {},
    }


def tensors(file: Path, kind: str) -> dict[str, Tensor]:
    data = torch.load(file, weights_only=True)
    return data["state_dict" if kind == "segmentation" else "model"]


def there_and_back(tmp_path: Path, kind: str, data: dict[str, Any]) -> tuple[Any, Any]:
    torch.save(data, tmp_path / "official.pth")
    there = convert(ConvertConfig(str(tmp_path / "official.pth"), str(tmp_path / "ours")))
    back = convert(ConvertConfig(str(tmp_path / "ours"), str(tmp_path / "back.pth")))
    return there, back


@pytest.mark.parametrize("kind", HEADS)
def test_there_and_back_to_the_bit(tmp_path: Path, kind: str) -> None:
    source = small(kind)
    data = official(kind, source)
    there, back = there_and_back(tmp_path, kind, data)
    model: Any = convmae.load_model(tmp_path / "ours")
    assert {k: v for k, v in model.config.items() if v != source.config.get(k)} == {}
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    before = data["state_dict" if kind == "segmentation" else "model"]
    before = {k: v for k, v in before.items() if not k.endswith("relative_position_index")}
    after = tensors(tmp_path / "back.pth", kind)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert there.missing == there.left_out == there.unexpected == back.left_out == []
    told = "2 index buffers are left out: they follow from the tables"
    assert (told in there.notes) == (kind == "segmentation")


def test_names_of_classes_go_with_a_segmenter(tmp_path: Path) -> None:
    there_and_back(tmp_path, "segmentation", official("segmentation", small("segmentation")))
    weights = convmae.open_weights(tmp_path / "ours")
    assert weights.classes == ("wall", "sky", "tree") and weights.statistics == IMAGENET
    data = torch.load(tmp_path / "back.pth", weights_only=True)
    assert data["meta"] == {"CLASSES": ("wall", "sky", "tree")} and data["optimizer"] == {}


@pytest.mark.parametrize("kind", ["segmentation", "detection"])
def test_index_buffers_are_written_on_request(tmp_path: Path, kind: str) -> None:
    save_weights(tmp_path / "ours", small(kind), f"{NAMES[kind]}convvit_tiny", None, IMAGENET)
    config = ConvertConfig(str(tmp_path / "ours"), str(tmp_path / "b.pth"), index_buffers=True)
    convert(config)
    state = tensors(tmp_path / "b.pth", kind)
    found = {k: v for k, v in state.items() if k.endswith("relative_position_index")}
    assert len(found) == 2
    for name, index in found.items():
        assert index.dtype == torch.int64 and index[0, 0] == (index.max() - index.min()) // 2
        table = state[name.replace("index", "bias_table")]
        tokens = {11 * 11: 36, 7 * 7: 16, 3 * 3: 4}[len(table)]
        assert index.shape == (tokens, tokens) and index.max() == len(table) - 1
    convert(ConvertConfig(str(tmp_path / "b.pth"), str(tmp_path / "again")))
    with pytest.raises(OptionError, match="index_buffers is for a .pth of an official"):
        config.output = str(tmp_path / "c.safetensors")
        convert(config)


@pytest.mark.parametrize("file", KEYS)
def test_the_published_lists_of_keys_are_of_known_models(file: str) -> None:
    """Names and shapes of all tensors of the published models, without values."""
    path = GOLDEN / "dense" / f"{file}.json"
    listed = {k: v for k, v in json.loads(path.read_text()).items() if not k.endswith("_index")}
    state = {key: torch.empty(shape, device="meta") for key, (shape, _, _) in listed.items()}
    for key in [key for key in state if key.endswith("pos_embed")]:
        state[key] = torch.zeros(state[key].shape)
    done = dense_weights(ConvertConfig("file", "out"), ForeignWeights(Path("file"), "", state))
    assert done.names == set(listed) and done.missing == []
    assert done.name == f"{NAMES[KEYS[file]]}convvit_base"
    size, classes = (512, 150) if KEYS[file] == "segmentation" else (1024, 80)
    size_told = done.config["img_size"]
    assert list(size_told) == [size, size] and done.config["num_classes"] == classes
    if KEYS[file] == "vitdet":
        assert (done.config["window_size"], done.config["global_blocks"]) == (14, [1, 4, 7, 10])


def test_what_the_official_codes_have_not_is_refused(tmp_path: Path) -> None:
    options = {"num_classes": 2, "head": "light", "img_size": 64} | SMALL
    model = create_model("segment:convvit_tiny", **options)
    save_weights(tmp_path / "light", model, "segment:convvit_tiny", None, IMAGENET)
    with pytest.raises(OptionError, match=r"no segmenter with the head 'light'"):
        convert(ConvertConfig(str(tmp_path / "light"), str(tmp_path / "x.pth")))
    for change, message in (
        ({"kind": "convvit"}, r"kind convvit does not fit .*\(init of segment train"),
        ({"format": "timm"}, "format timm does not fit"),
        ({"model": "segment:convvit_base"}, "is of segment:convvit_tiny"),
        ({"input_size": 96}, "sees pictures of any size"),
    ):
        with pytest.raises(OptionError, match=message):
            output = str(tmp_path / ("x.pth" if "format" in change else "x.safetensors"))
            convert(ConvertConfig(str(tmp_path / "light"), output, **change))  # type: ignore[arg-type]
    data = official("detection", small("detection"))
    del data["model"]["roi_heads.box_head.fc1.bias"]
    torch.save(data, tmp_path / "part.pth")
    with pytest.raises(OptionError, match=r"lacks roi_heads.box_head.*bias; detect:convvit_base"):
        convert(ConvertConfig(str(tmp_path / "part.pth"), str(tmp_path / "y")))
    assert not (tmp_path / "x.pth").exists() and not (tmp_path / "y").exists()


def test_classes_of_ours_stay(tmp_path: Path) -> None:
    names = ClassNames(("a", "b", "c"))
    model = small("segmentation", img_size=(64, 96))
    save_weights(tmp_path / "ours", model, "segment:convvit_tiny", None, IMAGENET, names)
    convert(
        ConvertConfig(
            str(tmp_path / "ours"), str(tmp_path / "copy"), mean=(0.1,) * 3, std=(0.2,) * 3
        )
    )
    copied = convmae.open_weights(tmp_path / "copy")
    assert copied.classes == names and copied.statistics.mean == (0.1,) * 3
    assert copied.config == convmae.open_weights(tmp_path / "ours").config
    with pytest.raises(OptionError, match=r"index_buffers: .* of 77 distances is of no square"):
        convert(ConvertConfig(str(tmp_path / "ours"), str(tmp_path / "d.pth"), index_buffers=True))
