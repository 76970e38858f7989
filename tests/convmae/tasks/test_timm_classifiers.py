"""Networks of timm that classify: finetuned and probed, from weights of SparK and FCMAE too."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch

import convmae
from convmae import (
    EvaluateConfig,
    FinetuneConfig,
    LinprobeConfig,
    OptionError,
    WeightsError,
    evaluate,
    finetune,
    linprobe,
    load_model,
    load_pretrained,
)
from convmae.data import Statistics
from convmae.models.adapt import adapt_input
from convmae.models.cnn.classifier import TimmClassifier
from convmae.models.cnn.timm_network import blocks_of
from convmae.training.optim import layer_decay_groups
from convmae.weights.checkpoint import open_weights, save_weights
from tests.support.paths import FASHION
from tests.support.training_runs import DEVICE, curve, interrupt_after, same, tensors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")
pytest.importorskip("torchmetrics")

pytestmark = pytest.mark.thorough(but_every=3)  # a sample of long sweeps

RESNET, CONVNEXT = "timm:test_resnet", "timm:test_convnext"
SHORT: dict[str, Any] = {
    "data_path": str(FASHION),
    "input_size": 32,
    "batch_size": 20,
    "max_samples": 40,
    "epochs": 1,
    "warmup_epochs": 0,
    "lr": 1e-3,
    "log_every": 1,
    "num_workers": 0,
    "amp": "float32",
    "device": DEVICE,
}


def finetuning(folder: Path, **changes: Any) -> FinetuneConfig:
    return FinetuneConfig(**(SHORT | {"output_dir": str(folder)} | changes))


def probing(folder: Path, **changes: Any) -> LinprobeConfig:
    return LinprobeConfig(**(SHORT | {"output_dir": str(folder)} | changes))


def classifier(name: str = RESNET, **changes: Any) -> Any:
    return convmae.create_model(name, **({"img_size": 32, "num_classes": 4} | changes)).eval()


def pretrained(folder: Path, name: str = RESNET, method: str = "spark", **changes: Any) -> Path:
    """A file as a pretraining run leaves it, its statistics of BatchNorm not those of the start."""
    torch.manual_seed(1)
    options = {"img_size": 64, "in_chans": 3, "decoder_width": 32, "method": method} | changes
    model: Any = convmae.create_model(name, **options)
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    channels = options["in_chans"]
    pictures = Statistics((0.3,) * channels, (0.2,) * channels)
    return save_weights(folder, model, name, pictures=pictures)


PREFIX = {"spark": "sparse_encoder.sp_cnn.", "fcmae": "encoder."}


def network_of(file: Path, method: str) -> dict[str, Any]:
    """timm's own state dict from a pretraining file."""
    state, prefix = open_weights(file).state, PREFIX[method]
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


# -- the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "dla46_c", "test_efficientnet"])
def test_it_is_timms_network(name: str) -> None:
    """The same weights give the same logits, by timm's own names."""
    model = classifier(f"timm:{name}", num_classes=5, in_chans=2)
    plain = timm.create_model(name, num_classes=5, in_chans=2).eval()
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    images = torch.randn(2, 2, 64, 96)
    assert torch.equal(model(images), plain(images))
    assert isinstance(model, TimmClassifier) and isinstance(model, type(plain))
    again = convmae.create_model(f"timm:{name}", **model.config)
    assert again.config == model.config and again.img_size == (32, 32)
    no_classes = convmae.create_model(f"timm:{name}", num_classes=0, in_chans=2).eval()
    load_state = {k: v for k, v in model.state_dict().items() if k in no_classes.state_dict()}
    no_classes.load_state_dict(load_state)
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    assert torch.equal(no_classes(images), features)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_it_can_be_copied_and_pickled(clone: Callable[[Any], Any]) -> None:
    model = classifier(head_norm=True)
    again = clone(model)
    images = torch.randn(2, 3, 32, 32)
    assert type(again) is type(model) and again.config == model.config
    assert torch.equal(again(images), model(images))


@pytest.mark.parametrize("name", [RESNET, CONVNEXT, "timm:dla46_c"])  # dla: a convolution
def test_a_probe_learns_the_head_alone(name: str) -> None:
    model = classifier(name, head_norm=True)
    model.freeze_features()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    learnt = [p for p in model.parameters() if p.requires_grad]
    prefix = model.head_prefix
    optimizer = torch.optim.SGD(learnt, lr=1.0)
    model.train()
    assert model.training
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    statistics = {f"0.{part}" for part in ("running_mean", "running_var", "num_batches_tracked")}
    assert changed == {prefix + end for end in {"1.weight", "1.bias"} | statistics}
    features = model.forward_head(model.forward_features(torch.randn(4, 3, 32, 32)), True)
    head = model.eval().get_classifier()
    if isinstance(head[1], torch.nn.Conv2d):
        features = features.flatten(1)[:, :, None, None]
    mean, var = head[0].running_mean, head[0].running_var
    shape = (1, -1, *[1] * (features.dim() - 2))
    normed = (features - mean.view(shape)) / (var.view(shape) + 1e-6).sqrt()
    torch.testing.assert_close(head(features), head[1](normed))


def test_blocks_are_found_and_compiled() -> None:
    model = classifier("timm:resnet18")
    assert [type(block).__name__ for block in blocks_of(model)] == ["BasicBlock"] * 8
    names = {type(b).__name__ for b in blocks_of(classifier("timm:convnext_atto"))}
    assert names == {"ConvNeXtBlock"}
    model = classifier()
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    keys = list(model.state_dict())
    model.compile_blocks("eager")
    assert torch.equal(model(images), expected) and list(model.state_dict()) == keys


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("timm:test_resnt", {}, "timm .* has no network 'test_resnt'; did you mean timm:test_res"),
        ("timm:test_vit", {}, r"test_vit gives \[1, .*expected maps .*a convolutional network"),
        ("timm:densenet121", {"drop_path_rate": 0.1}, "has no stochastic depth in timm"),
        (RESNET, {"global_pool": "sum"}, "global_pool must be True, .*one of avg, max"),
        (RESNET, {"global_pool": False}, "global_pool must be True"),
        (RESNET, {"num_classes": -1}, "num_classes must be a whole number from 0, got -1"),
        (RESNET, {"img_size": (32, 0)}, "img_size must be a positive whole number"),
    ],
)
def test_what_cannot_be(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convmae.create_model(name, **changes)


def test_pools_and_layers_are_timms() -> None:
    model, plain = classifier(global_pool="catavgmax"), timm.create_model("test_resnet")
    assert model.head_linear.in_features == 2 * plain.fc.in_features
    groups = layer_decay_groups(model, 0.1, 0.5)
    layers = timm.optim.param_groups_layer_decay(
        timm.create_model("test_resnet", num_classes=4, global_pool="catavgmax"),
        weight_decay=0.1,
        layer_decay=0.5,
    )
    assert [g["lr_scale"] for g in groups] == [g["lr_scale"] for g in layers]
    assert [len(g["params"]) for g in groups] == [len(g["params"]) for g in layers]


# -- weights of a pretraining run -----------------------------------------------------------------


@pytest.mark.parametrize("method", ["spark", "fcmae"])
@pytest.mark.parametrize("name", [RESNET, CONVNEXT])
def test_the_network_of_a_pretraining_run(tmp_path: Path, name: str, method: str) -> None:
    """Another size of pictures is fine; every tensor of the file is told."""
    file = pretrained(tmp_path, name, method)
    assert same(dict(load_model(file).state_dict()), open_weights(file).state)
    model = classifier(name)
    report = load_pretrained(model, file)
    state = network_of(file, method)
    after = model.state_dict()
    assert all(torch.equal(after[key], state[key]) for key in state)
    assert (
        set(report.missing)
        == set(after) - set(state)
        == {model.head_prefix + end for end in ("weight", "bias")}
    )
    everything = open_weights(file).state
    assert {PREFIX[method] + k for k in state} | set(report.left_out) == set(everything)
    assert (report.unexpected, report.resampled, report.adapted) == ([], [], None)
    assert report.loaded == len(state) and report.statistics == ((0.3,) * 3, (0.2,) * 3)
    plain = timm.create_model(name.removeprefix("timm:"), num_classes=0).eval()
    plain.load_state_dict(state)
    images = torch.randn(2, 3, 64, 32)
    torch.testing.assert_close(
        model.forward_head(model.forward_features(images), pre_logits=True), plain(images)
    )


@pytest.mark.parametrize(("channels", "how"), [(1, "sum"), (5, "repeat"), (2, "fresh")])
def test_other_channels(tmp_path: Path, channels: int, how: str) -> None:
    file = pretrained(tmp_path)
    model = classifier(in_chans=channels)
    fresh = model.conv1[0].weight.clone()
    report = load_pretrained(model, file, how)
    kernel = network_of(file, "spark")["conv1.0.weight"]
    expected = fresh if how == "fresh" else adapt_input(kernel, channels, how)
    assert torch.equal(model.conv1[0].weight, expected)
    assert report.adapted is not None and f"conv1.0.weight: 3 -> {channels}" in report.adapted
    assert report.statistics is None and "not used" in report.notes[-1]
    if how == "fresh":
        assert "conv1.0.weight" in report.missing
    else:
        with pytest.warns(convmae.WeightsWarning, match="conv1.0.weight: 3 ->"):
            adapted: Any = load_model(
                save_weights(tmp_path / "b", classifier(), RESNET), in_chans=channels
            )
        assert adapted.conv1[0].weight.shape[1] == channels


def test_a_pretraining_model_takes_a_network_too(tmp_path: Path) -> None:
    """Its decoder is that of the file where the method and the sizes are the same."""
    file = pretrained(tmp_path)
    options: dict[str, Any] = {"img_size": 64, "method": "spark"}
    same_sizes: Any = convmae.create_model(RESNET, decoder_width=32, **options)
    assert load_pretrained(same_sizes, file).missing == []
    assert same(dict(same_sizes.state_dict()), open_weights(file).state)
    wider: Any = convmae.create_model(RESNET, decoder_width=64, **options)
    report = load_pretrained(wider, file)
    assert "not of the model's size: fresh" in report.notes[0]
    assert same(dict(wider.network.state_dict()), network_of(file, "spark"))
    fcmae: Any = convmae.create_model(RESNET, img_size=64, method="fcmae", decoder_width=32)
    report = load_pretrained(fcmae, file)
    assert same(dict(fcmae.network.state_dict()), network_of(file, "spark"))
    own: Any = convmae.SparK(timm.create_model("test_resnet", num_classes=0), decoder_width=32)
    load_pretrained(own, file)
    assert same(dict(own.network.state_dict()), network_of(file, "spark"))
    of_classes = save_weights(tmp_path / "b", classifier(), RESNET)
    assert load_pretrained(fcmae, of_classes).left_out == ["fc.bias", "fc.weight"]
    grey: Any = convmae.create_model(RESNET, decoder_width=32, in_chans=1, **options)
    report = load_pretrained(grey, file)
    assert report.missing == [] and "dense_decoder.proj.weight" in str(report.adapted)


def test_weights_of_another_network(tmp_path: Path) -> None:
    """Names decide: networks of the same shapes may compute other things."""
    file = pretrained(tmp_path)
    model = classifier(CONVNEXT)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(WeightsError, match="is of timm:test_resnet, but the model is timm:test_c"):
        load_pretrained(model, file)
    with pytest.raises(WeightsError, match="is of timm:test_resnet, but the model is a ConvViT"):
        load_pretrained(convmae.create_model("convvit_tiny", img_size=32), file)
    of_convmae = save_weights(
        tmp_path / "b", convmae.create_model("convmae_tiny", img_size=32), "convmae_tiny"
    )
    with pytest.raises(WeightsError, match="is of convmae_tiny, but the model is timm:test_conv"):
        load_pretrained(model, of_convmae)
    assert same(dict(model.state_dict()), before)
    blurred = "timm:resnetblur18"
    blur = save_weights(tmp_path / "c", convmae.create_model(blurred, num_classes=2), blurred)
    with pytest.raises(WeightsError, match="is of timm:resnetblur18, but the model is timm:resnet"):
        load_pretrained(classifier("timm:resnet18"), blur)


@pytest.mark.parametrize("name", [RESNET, CONVNEXT])
def test_the_head_by_names_of_classes(tmp_path: Path, name: str) -> None:
    from convmae.data.classes import ClassNames

    first = classifier(name, num_classes=3)
    file = save_weights(tmp_path, first, name, classes=ClassNames(["cat", "dog", "owl"]))
    model = classifier(name, num_classes=2)
    report = load_pretrained(model, file, classes=ClassNames(["owl", "cat"]))
    weight = model.head_prefix + "weight"
    assert report.keeps_head and "by the names of 2 of its 3 classes" in report.head
    assert torch.equal(model.state_dict()[weight], first.state_dict()[weight][[2, 0]])
    report = load_pretrained(model, file, classes=ClassNames(["owl", "cow"]))
    assert not report.keeps_head and "1 of the 2 classes are none" in report.head
    assert set(report.left_out) == {weight, model.head_prefix + "bias"}
    probe = classifier(name, num_classes=3, head_norm=True)
    report = load_pretrained(probe, file, classes=ClassNames(["cat", "dog", "owl"]))
    assert not report.keeps_head and "is of another kind" in report.head


# -- runs -----------------------------------------------------------------------------------------


def test_finetuning_picks_the_network_of_a_run(tmp_path: Path) -> None:
    """Class names, statistics and channels travel as for ConvViT."""
    file = pretrained(tmp_path / "run", in_chans=1, method="fcmae")
    out = tmp_path / "out"
    config = finetuning(out, finetune=str(file), drop_path=0.05, model_ema=True)
    summary = finetune(config)
    weights = open_weights(out)
    assert weights.model == RESNET and weights.config["drop_path_rate"] == 0.05
    assert weights.pictures == ((0.3,), (0.2,)) and len(weights.classes or ()) == 10
    model: Any = load_model(out / "best")
    assert isinstance(model, TimmClassifier) and model.num_classes == 10
    figures = evaluate(
        EvaluateConfig(checkpoint=str(out / "best"), data_path=str(FASHION), device=DEVICE)
    )
    assert figures["acc1"] == pytest.approx(summary.evaluation["acc1"], abs=1e-4)
    plain = timm.create_model("test_resnet", num_classes=10, in_chans=1).eval()
    plain.load_state_dict(model.state_dict())
    images = torch.randn(2, 1, 32, 32)
    assert torch.equal(plain(images), model(images))


def test_files_of_other_code_without_the_name_of_their_network(tmp_path: Path) -> None:
    """One that tells its name is taken, as `convmae convert` takes it."""
    network = timm.create_model("test_resnet", num_classes=0, in_chans=1)
    bare, told = tmp_path / "bare.pth", tmp_path / "spark.pth"
    torch.save(network.state_dict(), bare)
    torch.save({"arch": "test_resnet", "module": network.state_dict()}, told)
    out = tmp_path / "out"
    seems = r"bare.pth seems to be of a convolutional network \(.* tensors: conv1"
    with pytest.raises(OptionError, match=rf"^model is needed: .*{seems}.*give model timm:NAME"):
        finetune(finetuning(out, finetune=str(bare)))
    of_convvit = {"finetune": str(bare), "model": "convvit_tiny"}
    with pytest.raises(OptionError, match=rf"{seems}.* the model is a ConvViT; .*model timm:NAME"):
        finetune(finetuning(out, **of_convvit))
    assert not (out / "log.txt").exists()
    finetune(finetuning(out, finetune=str(told), max_samples=20))
    assert open_weights(out).model == RESNET


@pytest.mark.thorough
def test_it_goes_on_to_the_last_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = finetuning(tmp_path / "a", model=RESNET, epochs=2)
    finetune(config)
    other = dataclasses.replace(config, output_dir=str(tmp_path / "b"))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        finetune(other)
    finetune(dataclasses.replace(other, resume="auto"))
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
    assert same(tensors(tmp_path / "a"), tensors(tmp_path / "b"))


def test_probing_leaves_the_network(tmp_path: Path) -> None:
    file = pretrained(tmp_path / "run", in_chans=1)
    linprobe(probing(tmp_path / "out", finetune=str(file)))
    state = network_of(file, "spark")
    after = tensors(tmp_path / "out")
    assert all(torch.equal(after[key], value) for key, value in state.items())
    norm = {f"fc.0.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")}
    assert after.keys() - state.keys() == norm | {"fc.1.weight", "fc.1.bias"}
    assert int(after["fc.0.num_batches_tracked"]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "timm:test_resnt"}, "model: timm .* has no network 'test_resnt'; did you mean"),
        ({"model": "timm:test_vit"}, "model: timm:test_vit gives .*expected maps"),
        ({"model": RESNET, "global_pool": False}, "no_global_pool classifies the top-left token"),
        ({"model": "convvit_tiny", "gp": "max"}, "gp max is for networks of timm"),
        ({"model": RESNET, "gp": "sum"}, "gp must be one of avg, max, avgmax, catavgmax"),
        ({"model": "timm:dla46_c", "drop_path": 0.2}, "drop_path 0.2: timm:dla46_c has no stoch"),
        ({"model": "timm:vgg11", "input_size": 16}, "input_size 16 x 16 .*timm:vgg11 cannot learn"),
        (
            {"model": RESNET, "batch_size": 1, "mixup": 0.0, "cutmix": 0.0},
            "input_size 32 x 32 with batch_size 1: .*Expected more than 1 value per channel",
        ),
        (
            {"model": "timm:dla46_c", "grad_checkpointing": True},
            "grad_checkpointing: timm:dla46_c cannot compute activations again",
        ),
        ({"model": CONVNEXT, "finetune": "FILE"}, "finetune: .* is of timm:test_resnet, but the"),
        ({"model": "convvit_tiny", "finetune": "FILE"}, "is of timm:test_resnet, but the model is"),
    ],
)
def test_what_a_run_refuses(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    if changes.get("finetune") == "FILE":
        changes = changes | {"finetune": str(pretrained(tmp_path / "run", in_chans=1))}
    with pytest.raises(OptionError, match=message):
        finetune(finetuning(tmp_path / "out", **changes))
    assert not (tmp_path / "out" / "log.txt").exists() and not list(tmp_path.glob("out/check*"))


def test_no_stochastic_depth_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finetune(finetuning(tmp_path / "out", model="timm:dla46_c"))
    assert "has no stochastic depth in timm: --drop_path has no effect" in capsys.readouterr().out
    assert open_weights(tmp_path / "out").config["drop_path_rate"] == 0.0


def test_lamb_and_the_loss_of_each_class(tmp_path: Path) -> None:
    """As the published finetuning of ResNets; and a size that 16 does not divide."""
    from timm.optim import Lamb

    from convmae.tasks.finetune import Finetuning

    options: dict[str, Any] = {"input_size": 40, "mixup": 0.0, "cutmix": 0.0}
    config = finetuning(tmp_path / "out", model=RESNET, opt="lamb", bce_loss=True, **options)
    finetune(config)
    assert open_weights(tmp_path / "out").config["img_size"] == [40, 40]
    optimizer = Finetuning().optimizer(Finetuning().groups(classifier(), config), config)
    assert isinstance(optimizer, Lamb) and optimizer.defaults["max_grad_norm"] is None
    assert optimizer.defaults["always_adapt"] and not optimizer.defaults["bias_correction"]
    with pytest.raises(OptionError, match="opt must be one of adamw, lamb, got 'sgd'"):
        finetune(finetuning(tmp_path / "bad", model=RESNET, opt="sgd"))
    with pytest.raises(OptionError, match="input_size must be multiples of 16"):
        finetune(finetuning(tmp_path / "bad", model="convvit_tiny", input_size=40))


def test_the_loss_of_each_class_is_binary_cross_entropy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from convmae.tasks.finetune import Finetuning

    found: list[Any] = []
    begin = Finetuning.begin

    def watching(task: Any, run: Any) -> None:
        begin(task, run)
        found.append(task.criterion)

    monkeypatch.setattr(Finetuning, "begin", watching)
    finetune(finetuning(tmp_path / "out", model=RESNET, bce_loss=True, smoothing=0.0))
    logits, targets = torch.randn(4, 10), torch.rand(4, 10)
    probabilities = logits.sigmoid()
    expected = targets * probabilities.log() + (1 - targets) * (1 - probabilities).log()
    torch.testing.assert_close(found[0](logits, targets), -expected.mean())
