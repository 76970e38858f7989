"""Weights of convolutional networks from and to the files of SparK, ConvNeXt V2 and timm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import convmae
from convmae.config import OptionError, WeightsError
from convmae.weights.checkpoint import open_weights
from convmae.weights.cnn_names import official_network, official_to_timm, timm_to_official
from convmae.weights.foreign import open_foreign
from convmae.weights.network_files import write_timm_weights
from convmae.weights.pretrained import classifier_for, load_pretrained
from tests.support.foreign_files import refused, run, same, save
from tests.support.network_files import (
    SPARK,
    convnext_name,
    filled,
    minkowski,
    spark_checkpoint,
    spark_names,
)

if TYPE_CHECKING:
    from pathlib import Path

timm = pytest.importorskip("timm")

pytestmark = pytest.mark.thorough(but_every=3)  # a sample of long sweeps

RESNET, CONVNEXT, V2 = "timm:test_resnet", "timm:test_convnext", "timm:convnextv2_atto"
# Width 64 is that of test_convnext's last map: no first projection.
CASES = [(RESNET, 64), (CONVNEXT, 64), (CONVNEXT, 96)]


def spark(name: str = RESNET, width: int = 64, **options: Any) -> Any:
    return filled(name, method="spark", img_size=64, decoder_width=width, **options)


def fcmae(name: str = V2) -> Any:
    return filled(name, method="fcmae", img_size=64, decoder_width=32)


def saved(folder: Path, model: Any, name: str) -> Path:
    """A file of ours."""
    from convmae.weights.checkpoint import write_weights

    file = folder / "ours.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(file, name, model.config, model.state_dict())
    return file


# -- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *(f"convnext_{size}" for size in ("atto", "tiny", "small", "base", "large", "xlarge")),
        *(f"convnextv2_{s}" for s in ("atto", "femto", "pico", "nano", "tiny", "base", "huge")),
    ],
)
def test_names_of_every_convnext_are_mapped_both_ways(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=5)
    own = model.state_dict()
    official = official_network(own)
    assert set(official) == {convnext_name(key) for key in own}
    assert [official_to_timm(key) for key in official] == list(own)
    assert [timm_to_official(official_to_timm(key)) for key in official] == list(official)
    filtered = timm.models.convnext.checkpoint_filter_fn({k: v for k, v in official.items()}, model)
    assert {k: v.shape for k, v in filtered.items()} == {k: v.shape for k, v in own.items()}


# -- official files to ours -----------------------------------------------------------------------


@pytest.mark.parametrize("name, width", CASES)
def test_a_file_of_sparks_code_becomes_ours(tmp_path: Path, name: str, width: int) -> None:
    model = spark(name, width)
    data = spark_checkpoint(model, name.removeprefix("timm:"))
    file = save(tmp_path / "spark.pth", data)
    report = run(file, tmp_path / "ours")
    weights = open_weights(tmp_path / "ours")
    assert weights.model == name and weights.config["method"] == "spark"
    expected = {k: v for k, v in model.state_dict().items() if ".head." not in k}
    assert same({k: v for k, v in weights.state.items() if ".head." not in k}, expected)
    assert weights.config["mask_ratio"] == 0.75 and weights.config["decoder_width"] == width
    assert set(report.unexpected) == {"imn_m", "imn_s", "norm_black", "config"}
    assert report.missing == [k for k in model.state_dict() if ".head." in k]
    built = weights.build_model()
    assert bool(torch.isfinite(built(torch.rand(2, 3, 64, 64)).loss))


def test_prefixes_of_wrappers_and_bare_encoders(tmp_path: Path) -> None:
    model = spark()
    data = spark_checkpoint(model, "test_resnet")
    data["module"] = {f"module.{key}": value for key, value in data["module"].items()}
    run(save(tmp_path / "a.pth", data), tmp_path / "a")
    assert same(open_weights(tmp_path / "a").state, model.state_dict())
    bare = model.network.state_dict()
    for number, content in enumerate((bare, {"module": bare})):
        file = save(tmp_path / f"timm_style{number}.pth", content)
        run(file, tmp_path / f"out{number}", model=RESNET)
        weights = open_weights(tmp_path / f"out{number}")
        assert same(weights.state, bare) and weights.config["num_classes"] == 0
    # The same encoder within SparK's names, without the decoder.
    data["module"] = {SPARK + key: value for key, value in bare.items()}
    run(save(tmp_path / "b.pth", data), tmp_path / "b")
    assert same(open_weights(tmp_path / "b").state, bare)


def test_a_bare_file_of_sparks_convnext(tmp_path: Path) -> None:
    model = spark(CONVNEXT)
    bare = {k.removeprefix(SPARK): v for k, v in spark_names(model.state_dict()).items()}
    bare = {k: v for k, v in bare.items() if k.startswith(("downsample_layers", "stages"))}
    run(save(tmp_path / "a.pth", bare), tmp_path / "out", model=CONVNEXT)
    own = {k: v for k, v in model.network.state_dict().items() if not k.startswith("head.")}
    state = open_weights(tmp_path / "out").state
    assert same({k: v for k, v in state.items() if not k.startswith("head.")}, own)


@pytest.mark.thorough
def test_an_fcmae_trained_with_sparse_convolutions(tmp_path: Path) -> None:
    model = fcmae()
    state = minkowski(model.state_dict())
    assert state["encoder.downsample_layers.1.1.kernel"].shape == (4, 40, 80)
    assert state["encoder.stages.0.0.dwconv.kernel"].shape == (49, 40)
    assert state["encoder.stages.0.0.grn.gamma"].shape == (1, 160)
    report = run(save(tmp_path / "a.pth", {"model": state}), tmp_path / "out")
    weights = open_weights(tmp_path / "out")
    assert weights.model == V2 and weights.config["method"] == "fcmae"
    own = {k: v for k, v in model.state_dict().items() if ".head." not in k}
    assert same({k: v for k, v in weights.state.items() if ".head." not in k}, own)
    assert report.missing == ["encoder.head.norm.weight", "encoder.head.norm.bias"]


@pytest.mark.thorough
def test_a_released_fcmae_is_an_encoder_alone(tmp_path: Path) -> None:
    network = filled(V2, num_classes=0)
    own = {k: v for k, v in network.state_dict().items() if not k.startswith("head.")}
    released = {convnext_name(k): v[None, None, None] if "grn" in k else v for k, v in own.items()}
    run(save(tmp_path / "a.pt", {"model": released}), tmp_path / "out")
    weights = open_weights(tmp_path / "out")
    assert weights.model == V2
    assert same({k: v for k, v in weights.state.items() if not k.startswith("head.")}, own)
    run(save(tmp_path / "b.pt", {"model": released}), tmp_path / "fcmae", kind="fcmae")
    assert open_weights(tmp_path / "fcmae").config["method"] == "fcmae"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_timms_own_weights_need_the_name(tmp_path: Path, suffix: str) -> None:
    network = timm.create_model("resnet18", num_classes=5, in_chans=2)
    file = tmp_path / f"resnet18{suffix}"
    if suffix == ".pth":
        torch.save(network.state_dict(), file)
    else:
        from safetensors.torch import save_file

        save_file(network.state_dict(), file)
    message = refused(file)
    assert "model is needed" in message and "model timm:resnet18, and others" in message
    with pytest.raises(WeightsError, match="model is needed: .*model timm:resnet18, and others"):
        classifier_for(open_foreign(file))
    run(file, tmp_path / "out", model="timm:resnet18", mean=(0.0, 0.0), std=(1.0, 1.0))
    weights = open_weights(tmp_path / "out")
    assert same(weights.state, network.state_dict())
    assert weights.config["num_classes"] == 5 and weights.config["in_chans"] == 2


# -- and back -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, width", CASES)
def test_a_round_trip_through_an_official_file_is_bit_equal(
    tmp_path: Path, name: str, width: int
) -> None:
    model = spark(name, width)
    with torch.no_grad():  # what SparK's ConvNeXt has not is as it was drawn
        for key, value in model.network.named_parameters():
            if key.startswith("head.norm."):
                value.fill_(float(key.endswith("weight")))
    file = saved(tmp_path / "run", model, name)
    official = tmp_path / "official.pth"
    run(file, official, format="spark")
    data = torch.load(official, weights_only=True)
    assert data["arch"] == name.removeprefix("timm:") and data["is_pretrain"] is True
    expected = set(spark_names(model.state_dict())) | {"imn_m", "imn_s", "norm_black", "config"}
    assert set(data["module"]) == expected
    assert not data["module"]["norm_black"].any()
    assert data["module"]["config"]["dense_decoder.width"] == width
    assert ("densify_projs.0.weight" in data["module"]) == ((name, width) != (CONVNEXT, 64))
    run(official, tmp_path / "back")
    back = open_weights(tmp_path / "back")
    assert same(back.state, model.state_dict())
    assert (back.model, back.config) == (name, model.config)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", [RESNET, CONVNEXT])
def test_timm_reads_what_is_written_for_it(tmp_path: Path, name: str, suffix: str) -> None:
    model = convmae.create_model(name, method="spark", img_size=64, decoder_width=64)
    model.train()(torch.rand(2, 3, 64, 64))  # running statistics move
    file, bare = tmp_path / f"timm{suffix}", name.removeprefix("timm:")
    run(saved(tmp_path, model, name), file, format="timm")
    images = torch.rand(2, 3, 64, 64)
    model.eval()
    features = model.network(images)
    again = timm.create_model(bare, num_classes=0, checkpoint_path=str(file)).eval()
    assert torch.equal(again(images), features)
    overlay = {"file": str(file), "num_classes": 0}
    tuned = timm.create_model(bare, pretrained=True, num_classes=4, pretrained_cfg_overlay=overlay)
    assert torch.equal(tuned.eval().forward_head(tuned.forward_features(images), True), features)
    write_timm_weights(tmp_path / f"direct{suffix}", model)
    direct = timm.create_model(
        bare, num_classes=0, checkpoint_path=str(tmp_path / f"direct{suffix}")
    )
    assert torch.equal(direct.eval()(images), features)


# -- what is refused ------------------------------------------------------------------------------


def test_files_of_other_networks_are_refused_by_both_names(tmp_path: Path) -> None:
    file = save(tmp_path / "a.pth", spark_checkpoint(spark(), "test_resnet"))
    message = refused(file, model=CONVNEXT)
    assert CONVNEXT in message and RESNET in message
    message = refused(file, kind="convmae")
    assert "kind convmae is of ConvMAE" in message
    with pytest.raises(WeightsError, match="test_resnet.*timm:test_convnext"):
        load_pretrained(spark(CONVNEXT), file)
    message = refused(file, model="timm:resnet5")
    assert "timm:resnet50" in message
    data = spark_checkpoint(spark(), "test_resnet")
    lacking = next(key for key in data["module"] if key.startswith(SPARK + "layer2"))
    del data["module"][lacking], data["module"]["imn_m"]
    assert lacking in refused(save(tmp_path / "b.pth", data))
    data = spark_checkpoint(spark(), "test_resnet")
    data["module"]["dense_decoder.proj.weight"] = torch.ones(3, 5, 1, 1)
    assert "dense_decoder.proj.weight" in refused(save(tmp_path / "c.pth", data))


def test_formats_that_cannot_be(tmp_path: Path) -> None:
    file = saved(tmp_path, fcmae(V2), V2)
    with pytest.raises(OptionError, match="FCMAE"):
        run(file, tmp_path / "a.pth", format="spark")
    with pytest.raises(OptionError, match=r"ends in \.pth"):
        run(file, tmp_path / "a.safetensors", format="spark")
    wide = saved(tmp_path / "wide", _rectangle(), RESNET)
    with pytest.raises(OptionError, match="64 x 96 pixels; input_size"):
        run(wide, tmp_path / "b.pth")
    run(wide, tmp_path / "b.pth", input_size=64)
    assert torch.load(tmp_path / "b.pth", weights_only=True)["input_size"] == 64


def _rectangle() -> Any:
    return filled(RESNET, method="spark", img_size=(64, 96), decoder_width=64)


# -- to begin a pretraining with ------------------------------------------------------------------


@pytest.mark.parametrize("method", ["spark", "fcmae"])
def test_pretraining_begins_with_weights_of_timm(tmp_path: Path, method: str) -> None:
    network = timm.create_model("test_resnet", num_classes=5)
    with torch.no_grad():
        for value in network.buffers():
            value.fill_(2)
    file = save(tmp_path / "timm.pth", network.state_dict())
    model = filled(RESNET, method=method, img_size=64, decoder_width=64)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = load_pretrained(model, file)
    after = model.state_dict()
    own = model.network.state_dict()
    assert same(own, {k: v for k, v in network.state_dict().items() if k in own})
    fresh = [k for k in after if not k.startswith(("sparse_encoder.", "encoder."))]
    assert set(report.missing) == set(fresh) and "not in it, so fresh" in str(report)
    assert all(torch.equal(after[k], before[k]) for k in fresh)
    assert {"fc.weight", "fc.bias"} <= set(report.left_out)
    grey = filled(RESNET, method=method, img_size=64, decoder_width=64, in_chans=1)
    report = load_pretrained(grey, file)
    assert report.adapted is not None
    summed = network.conv1[0].weight.sum(1, keepdim=True)
    name = next(k for k in own if own[k].dim() == 4)
    assert torch.allclose(grey.network.state_dict()[name], summed)


def test_pretraining_begins_with_official_files(tmp_path: Path) -> None:
    donor = spark(CONVNEXT, 96)
    file = save(tmp_path / "spark.pth", spark_checkpoint(donor, "test_convnext"))
    model = spark(CONVNEXT, 96)
    load_pretrained(model, file)
    differing = [
        k for k, v in donor.state_dict().items() if not torch.equal(v, model.state_dict()[k])
    ]
    assert all("head.norm" in key for key in differing)
    narrow = spark(CONVNEXT, 32)
    before = narrow.state_dict()["mask_tokens.0"].clone()
    report = load_pretrained(narrow, file)
    assert "decoder" in " ".join(report.lines())
    assert torch.equal(narrow.state_dict()["mask_tokens.0"], before)
    stem = SPARK + "stem.0.weight"
    assert torch.equal(narrow.state_dict()[stem], donor.state_dict()[stem])
    other = fcmae()
    state = minkowski(other.state_dict())
    model = fcmae()
    load_pretrained(model, save(tmp_path / "fcmae.pth", {"model": state}))
    assert torch.equal(model.pred.weight, other.pred.weight)
    kernel = "encoder.stages.3.downsample.1.weight"
    assert torch.equal(model.state_dict()[kernel], other.state_dict()[kernel])
