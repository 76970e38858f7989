"""Finetuning, probing and evaluation on real pictures: what learns, exact resume, best weights."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

import convmae
from convmae import (
    EvaluateConfig,
    FinetuneConfig,
    LinprobeConfig,
    OptionError,
    PretrainConfig,
    evaluate,
    finetune,
    linprobe,
    load_model,
    pretrain,
)
from convmae.records import log as logs
from convmae.training.optim import lars, layer_decay_groups
from convmae.weights.checkpoint import open_weights, read_training_state
from tests.support.paths import FASHION
from tests.support.training_runs import DEVICE, curve, interrupt_after, same, tensors

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")
pytest.importorskip("torchmetrics")

pytestmark = pytest.mark.thorough(but_every=3)  # a sample of long sweeps

SHORT: dict[str, Any] = {
    "data_path": str(FASHION),
    "input_size": 32,
    "batch_size": 20,
    "max_samples": 60,
    "epochs": 2,
    "warmup_epochs": 1,
    "lr": 1e-3,
    "log_every": 1,
    "num_workers": 0,
    "amp": "float32",
    "device": DEVICE,
}


def finetuning(folder: Path, **changes: Any) -> FinetuneConfig:
    """2 epochs of 3 steps, everything on that the published recipe has."""
    return FinetuneConfig(
        **(SHORT | {"model": "convvit_tiny", "output_dir": str(folder)} | changes)
    )


def probing(folder: Path, **changes: Any) -> LinprobeConfig:
    return LinprobeConfig(
        **(SHORT | {"model": "convvit_tiny", "output_dir": str(folder)} | changes)
    )


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ConvMAE that has seen a few pictures."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    pretrain(PretrainConfig(**(SHORT | {"model": "convmae_tiny", "output_dir": str(folder)})))
    return folder


def evaluations(folder: Path) -> list[tuple[float, ...]]:
    return [
        (e["step"], e["acc1"], e["acc5"], e["loss"])
        for e in logs.read_log(folder)
        if e.get("event") == "evaluation"
    ]


# -- from pretraining to an accuracy --------------------------------------------------------------


def test_pretrained_weights_are_finetuned_evaluated_and_kept(
    pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = finetune(finetuning(tmp_path / "run", model=None, finetune=str(pretrained)))
    text = capsys.readouterr().out
    assert summary.steps == 6
    assert "convvit_tiny" in text and "10 classes" in text  # the size of the pretrained model
    found = evaluations(tmp_path / "run")
    assert [step for step, *_ in found] == [3, 6]
    assert summary.evaluation["acc1"] == found[-1][1]
    assert all(0 <= acc1 <= acc5 <= 100 for _, acc1, acc5, _ in found)
    best = max(found, key=lambda entry: (entry[1], -entry[0]))
    output = tmp_path / "figures" / "out.json"
    config = EvaluateConfig(
        str(tmp_path / "run" / "best"),
        str(FASHION),
        device=DEVICE,
        amp="float32",
        output=str(output),
    )
    result = evaluate(dataclasses.replace(config, batch_size=33))  # the last batch is partial
    assert result["images"] == 200
    assert (result["acc1"], result["acc5"]) == pytest.approx(best[1:3], abs=1e-4)
    assert result["loss"] == pytest.approx(best[3], rel=1e-4)
    assert json.loads(output.read_text()) == result
    model = load_model(tmp_path / "run")
    assert isinstance(model, convmae.ConvViT) and model.num_classes == 10
    assert open_weights(tmp_path / "run" / "best").pictures is not None


def test_accuracy_is_that_of_a_plain_count(pretrained: Path, tmp_path: Path) -> None:
    from convmae.data import normalise
    from convmae.data.open import open_source
    from convmae.data.transforms import EvalTransform

    finetune(finetuning(tmp_path / "run", epochs=1))
    weights = open_weights(tmp_path / "run")
    model = load_model(tmp_path / "run")
    right = top5 = total = 0
    loss = 0.0
    batches = open_source(str(FASHION), split="val").evaluation_batches(
        EvalTransform((32, 32)), 64, rank=0, world=1, workers=0, pin=False
    )
    for batch in batches:
        real = batch.labels >= 0
        with torch.no_grad():
            logits = model(normalise(batch.images, *weights.statistics))[real]
        labels = batch.labels[real]
        right += int((logits.argmax(1) == labels).sum())
        top5 += int((logits.topk(5).indices == labels[:, None]).any(1).sum())
        loss += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        total += len(labels)
    assert total == 200
    step, acc1, acc5, mean_loss = evaluations(tmp_path / "run")[-1]
    assert (acc1, acc5) == pytest.approx((100 * right / 200, 100 * top5 / 200))
    assert mean_loss == pytest.approx(loss / 200, rel=1e-5)


@pytest.mark.thorough
def test_training_learns(tmp_path: Path) -> None:
    plain = {"mixup": 0, "cutmix": 0, "aa": None, "reprob": 0, "drop_path": 0, "layer_decay": 1}
    config = finetuning(tmp_path / "run", epochs=12, max_samples=None, batch_size=50, **plain)
    summary = finetune(dataclasses.replace(config, log_every=12, eval_every=12, lr=2e-3))
    assert summary.last_loss < 0.8 * summary.first_loss
    assert summary.evaluation["acc1"] > 40  # of 10 classes


# -- the recipe -----------------------------------------------------------------------------------


def test_layer_decay_groups_are_the_official_ones() -> None:
    with torch.device("meta"):
        model = convmae.create_model("convvit_base")
    groups = layer_decay_groups(model, 0.05, 0.65)
    names = {id(p): name for name, p in model.named_parameters()}
    scale = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert len(scale) == len(names)
    first = [name for name, value in scale.items() if value == pytest.approx(0.65**12)]
    assert len(first) == 71 and pytest.approx(0.005688, rel=1e-3) == 0.65**12
    for name, value in scale.items():
        if name.startswith("blocks3."):
            assert value == pytest.approx(0.65 ** (11 - int(name.split(".")[1])))
        elif name.startswith(("fc_norm", "head")):
            assert value == 1.0
        else:
            assert name in first
    assert scale["blocks3.0.mlp.fc1.weight"] == pytest.approx(0.008751, rel=1e-4)
    assert scale["blocks3.10.mlp.fc1.weight"] == pytest.approx(0.65)
    for name, parameter in model.named_parameters():
        undecayed = parameter.ndim == 1 or name == "pos_embed"
        assert decay[name] == (0.0 if undecayed else 0.05)


def test_every_layer_gets_its_share_of_the_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, ...]] = []
    step = torch.optim.AdamW.step

    def noting(optimizer: torch.optim.Optimizer, *args: Any) -> Any:
        seen.append(tuple(sorted({g["lr"] / g["lr_scale"] for g in optimizer.param_groups})))
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    finetune(finetuning(tmp_path / "run", epochs=1, eval_every=5))
    assert [len(rates) for rates in seen] == [1, 1, 1] or all(
        max(rates) == pytest.approx(min(rates)) for rates in seen
    )
    assert [max(rates) for rates in seen] == pytest.approx(
        [point[3] for point in curve(tmp_path / "run")]
    )


def test_a_new_head_is_small_after_pretraining(pretrained: Path, tmp_path: Path) -> None:
    from convmae.data.open import open_source
    from convmae.tasks.finetune import Finetuning
    from convmae.tasks.probe import Probing

    source = open_source(str(FASHION))
    for config, task, wanted in (
        (finetuning(tmp_path, finetune=str(pretrained)), Finetuning(), 2e-5),
        (finetuning(tmp_path), Finetuning(), 0.02),
        (probing(tmp_path, finetune=str(pretrained)), Probing(), 0.01),
    ):
        model: Any = task.build(config, source)[0]
        head = model.head if isinstance(task, Finetuning) else model.head[1]
        assert float(head.weight.detach().std()) == pytest.approx(wanted, rel=0.15)


def test_lars_is_the_official_rule() -> None:
    """Momentum 0.9, trust 0.001; vectors are neither adapted nor decayed."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(7, 5).double()
    weight, bias = (p.detach().clone() for p in (layer.weight, layer.bias))
    optimizer = lars([{"params": [layer.weight, layer.bias], "weight_decay": 0.0}])
    momenta = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for step in range(4):
        gradients = [torch.randn_like(weight), torch.randn_like(bias)]
        layer.weight.grad, layer.bias.grad = (g.clone() for g in gradients)
        for group in optimizer.param_groups:
            group["lr"] = 1.6 * (step + 1) / 4
        optimizer.step()
        rate = 1.6 * (step + 1) / 4
        adapted = gradients[0] * 0.001 * weight.norm() / gradients[0].norm()
        for value, momentum, gradient in zip(
            (weight, bias), momenta, (adapted, gradients[1]), strict=True
        ):
            momentum.mul_(0.9).add_(gradient)
            value.sub_(rate * momentum)
        torch.testing.assert_close(layer.weight.detach(), weight, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(layer.bias.detach(), bias, rtol=1e-9, atol=1e-12)


# -- probing --------------------------------------------------------------------------------------


def test_a_probe_trains_its_head_alone(pretrained: Path, tmp_path: Path) -> None:
    summary = linprobe(probing(tmp_path / "run", finetune=str(pretrained), model=None))
    assert summary.steps == 6 and 0 <= summary.evaluation["acc1"] <= 100
    probe, encoder = tensors(tmp_path / "run"), tensors(pretrained)
    shared = [name for name in probe if not name.startswith(("head", "fc_norm"))]
    assert len(shared) > 50
    assert all(torch.equal(probe[name], encoder[name]) for name in shared)
    model: Any = load_model(tmp_path / "run")
    norm, layer = model.head
    assert isinstance(norm, torch.nn.BatchNorm1d) and not norm.affine and norm.eps == 1e-6
    assert int(norm.num_batches_tracked) == 6 and layer.weight.shape[0] == 10
    figures = evaluate(
        EvaluateConfig(str(tmp_path / "run"), str(FASHION), device=DEVICE, amp="float32")
    )
    assert figures["acc1"] == pytest.approx(summary.evaluation["acc1"], abs=1e-4)


# -- the same run, in pieces ----------------------------------------------------------------------


@pytest.mark.thorough(but_every=3)
@pytest.mark.parametrize("command", ["finetune", "linprobe"])
def test_interrupted_and_resumed_is_the_same_run(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Mixup, erasing, RandAugment, stochastic depth and the running average included."""
    if command == "finetune":
        function: Any = finetune
        config: Any = finetuning(tmp_path, finetune=str(pretrained), model_ema=True, accum_iter=2)
        config = dataclasses.replace(config, batch_size=10, model_ema_decay=0.9, drop_path=0.3)
    else:
        function, config = linprobe, probing(tmp_path, finetune=str(pretrained))
    whole = dataclasses.replace(config, output_dir=str(tmp_path / "whole"))
    parts = dataclasses.replace(config, output_dir=str(tmp_path / "parts"))
    function(whole)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4 * config.accum_iter)
        assert function(parts).interrupted
    function(dataclasses.replace(parts, resume="auto"))
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert evaluations(tmp_path / "parts") == evaluations(tmp_path / "whole")
    assert same(tensors(tmp_path / "parts"), tensors(tmp_path / "whole"))
    states = [read_training_state(tmp_path / name)[1]["task"] for name in ("parts", "whole")]
    assert states[0]["best"] == states[1]["best"]
    if command == "finetune":
        assert same(states[0]["ema"], states[1]["ema"])
        assert not same(states[0]["ema"], tensors(tmp_path / "whole"))


def test_the_running_average_is_what_is_evaluated_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    step = torch.optim.AdamW.step

    def noting(optimizer: torch.optim.Optimizer, *args: Any) -> Any:
        result = step(optimizer, *args)
        values = [p for group in optimizer.param_groups for p in group["params"]]
        seen.append({str(i): p.detach().cpu().clone() for i, p in enumerate(values)})
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    finetune(finetuning(tmp_path / "run", epochs=1, model_ema=True, model_ema_decay=0.5))
    state = read_training_state(tmp_path / "run")[1]["task"]["ema"]
    assert same(state, tensors(tmp_path / "run" / "best"))
    head = [{k: v for k, v in s.items() if v.shape == (10,)} for s in seen]  # the head's bias
    (name,) = head[0]
    average = torch.zeros(10)  # a head's bias begins at 0
    for values in head:
        average = 0.5 * average + 0.5 * values[name]
    torch.testing.assert_close(state["head.bias"], average)


# -- what is refused ------------------------------------------------------------------------------

BAD: dict[str, dict[str, Any]] = {
    "nb_classes 3 is fewer than the 10 classes": {"nb_classes": 3},
    "nb_classes must be a whole number at least 2": {"nb_classes": 1},
    "'convmae_tiny' does not classify; did you mean convvit_tiny": {"model": "convmae_tiny"},
    "batch_size must be even for mixup and cutmix": {"batch_size": 15},
    "color_jitter 0.4 has no effect beside aa": {"color_jitter": 0.4},
    "layer_decay must be a number above 0 and at most 1": {"layer_decay": 0},
    "drop_path must be a number at least 0 and below 1": {"drop_path": 1},
    "smoothing must be": {"smoothing": -0.1},
    "remode must be one of const, rand, pixel, got 'noise'": {"remode": "noise"},
    "crop_pct must be": {"crop_pct": 1.5},
    "model_ema keeps a whole copy": {"model_ema": True, "strategy": "fsdp2"},
    "amp float16 cannot scale": {"amp": "float16", "strategy": "fsdp2"},
    "strategy ddp needs processes: torchrun": {"strategy": "ddp"},
    "finetune 'nowhere' does not exist": {"finetune": "nowhere"},
    "mean is given without std": {"mean": (0.5,)},
    "mean and std have 3 numbers (as given), but": {
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
    },
    "std must be a number above 0": {"mean": (0.5,), "std": (0.0,)},
    "torchcompile must be blocks, which": {"torchcompile": "inducer"},
    "data_path 'demo' holds pictures without labels": {"data_path": "demo", "max_samples": None},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_options_are_refused_before_anything_is_written(tmp_path: Path, message: str) -> None:
    with pytest.raises(ValueError) as error:
        finetune(finetuning(tmp_path / "run", **BAD[message]))
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_probe_refuses_what_it_would_ignore(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="min_crop 0.5 has no effect in linprobe"):
        linprobe(probing(tmp_path / "run", min_crop=0.5))
    with pytest.raises(OptionError, match="strategy fsdp2 divides what is trained"):
        linprobe(probing(tmp_path / "run", strategy="fsdp2"))


def test_what_does_not_classify_is_not_evaluated(pretrained: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is a ConvMAE, which does not classify"):
        evaluate(EvaluateConfig(str(pretrained), str(FASHION), device=DEVICE))
    finetune(finetuning(tmp_path / "run", epochs=1))
    with pytest.raises(OptionError, match="has pictures of 3 channels, but the model takes 1"):
        from tests.support.training_runs import folder_of

        for split in ("train", "val"):
            for kind in ("cat", "dog"):
                folder_of(tmp_path / "data" / split / kind, 2)
        evaluate(EvaluateConfig(str(tmp_path / "run"), str(tmp_path / "data"), device=DEVICE))
