"""`load_pretrained`: weights of any origin into a classifier."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import convmae
from convmae.config import WeightsError
from convmae.models import resample_pos_embed
from convmae.weights.foreign import open_foreign
from convmae.weights.pretrained import (
    classifier_for,
    load_pretrained,
)
from tests.support.foreign_files import encoder_of, official, refused, run, same, save

if TYPE_CHECKING:
    from pathlib import Path

HEAD = {"head.weight", "head.bias"}
FRESH = HEAD | {"fc_norm.weight", "fc_norm.bias"}


def test_an_encoder_goes_into_a_classifier(tmp_path: Path) -> None:
    state = official()
    file = save(tmp_path / "a.pth", {"model": state})
    model = convmae.create_model("convvit_tiny", img_size=(32, 96), num_classes=5)
    head = model.head.weight.detach().clone()
    report = load_pretrained(model, open_foreign(file))
    assert set(report.missing) == FRESH and report.unexpected == []
    assert report.resampled == ["pos_embed: 4 x 4 -> 2 x 6 patches"]
    assert {key for key in state if key.startswith(("decoder", "norm"))} < set(report.left_out)
    assert "fresh: head (2 tensors), fc_norm (2 tensors)" in str(report)
    own = dict(model.state_dict())
    for key in own.keys() - FRESH - {"pos_embed"}:
        assert torch.equal(own[key], state[key])
    position = resample_pos_embed(state["pos_embed"], (4, 4), (2, 6))
    assert torch.equal(own["pos_embed"], position) and model.pos_embed.requires_grad
    assert torch.equal(own["head.weight"], head)
    assert classifier_for(open_foreign(file)) == "convvit_tiny" and open_foreign(file).ours is None


def test_without_global_pool_only_the_head_is_fresh(tmp_path: Path) -> None:
    file = save(tmp_path / "a.pth", encoder_of(official()))
    model = convmae.create_model("convvit_tiny", img_size=64, global_pool=False)
    assert set(load_pretrained(model, open_foreign(file)).missing) == HEAD


def test_a_classifier_keeps_its_head_for_the_same_classes_only(tmp_path: Path) -> None:
    state = official("convvit_tiny", num_classes=7)
    run(save(tmp_path / "a.pth", {"model": state}), tmp_path / "ours")
    model = convmae.create_model("convvit_tiny", img_size=64, num_classes=7)
    assert load_pretrained(model, open_foreign(tmp_path / "ours")).missing == []
    assert same(dict(model.state_dict()), state)
    model = convmae.create_model("convvit_tiny", img_size=64, num_classes=3)
    report = load_pretrained(model, open_foreign(tmp_path / "ours"))
    assert set(report.missing) == HEAD == set(report.left_out)
    assert torch.equal(model.fc_norm.weight, state["fc_norm.weight"])
    assert open_foreign(tmp_path / "ours").ours.pictures is not None


def test_what_does_not_fit_a_classifier_is_told(tmp_path: Path) -> None:
    model = convmae.create_model("convvit_small", img_size=64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    file = save(tmp_path / "tiny.pth", official())
    with pytest.raises(WeightsError) as error:
        load_pretrained(model, open_foreign(file))
    for part in ("pos_embed of shape [1, 16, 256]", "takes [1, 16, 384]", "convvit_tiny fits"):
        assert part in str(error.value)
    state = official("convmae_small")
    del state["blocks3.4.attn.qkv.weight"]
    file = save(tmp_path / "part.pth", state)
    with pytest.raises(WeightsError, match=r"lacks blocks3.4.attn.qkv.weight, which"):
        load_pretrained(model, open_foreign(file))
    assert "lacks blocks3.4.attn.qkv.weight; an encoder" in refused(file)
    assert same(dict(model.state_dict()), before)
