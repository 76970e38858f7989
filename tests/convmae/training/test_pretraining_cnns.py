"""`convmae pretrain --model timm:NAME`: options, refusals, a run in pieces, what it leaves."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

import convmae
from convmae import OptionError, PretrainConfig, pretrain
from convmae.commands.reconstruct import reconstruct
from convmae.config import ReconstructConfig
from convmae.models.cnn import MaskedCNN
from convmae.training.optim import clips_by_itself, lamb, make_scheduler, sgd
from convmae.weights.checkpoint import open_weights, read_training_state
from tests.support.training_runs import curve, folder_of, interrupt_after, options, same, tensors

if TYPE_CHECKING:
    from pathlib import Path

timm = pytest.importorskip("timm")

RESNET, CONVNEXT = "timm:test_resnet", "timm:test_convnext"
# Of 6 blocks 2.7 are visible before they are rounded.
ONE_EPOCH = {"epochs": 1, "mask_ratio": 0.55, "norm_pix_loss": False}
SPARK, FCMAE = {"method": "spark", "decoder_width": 32}, {"method": "fcmae", "decoder_width": 16}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("cnn") / "data", 12, size=80)


def cnn(pictures: Path, output: Path, **changes: Any) -> PretrainConfig:
    """A run of 2 epochs of 3 steps on pictures of 2 x 3 blocks."""
    values = {"model": RESNET, "input_size": (64, 96), "amp": "float32", **FCMAE}
    return options(pictures, output, **values | changes)


@pytest.fixture(scope="module")
def fcmae_run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one epoch; tests read it."""
    run = tmp_path_factory.mktemp("fcmae") / "run"
    pretrain(cnn(pictures, run, **ONE_EPOCH))
    return run


# -- options --------------------------------------------------------------------------------------


def test_a_method_sets_what_is_not_given() -> None:
    def values(**given: Any) -> tuple[Any, ...]:
        config = PretrainConfig(**given).filled()
        config.validate()
        names = ("method", "mask_ratio", "mask_rounding", "norm_pix_loss", "decoder_width")
        return tuple(getattr(config, name) for name in names)

    assert values() == ("mae", 0.75, None, False, None)
    assert values(model=RESNET) == ("fcmae", 0.6, "floor", True, 512)
    assert values(model=RESNET, method="spark") == ("spark", 0.6, "round", True, 768)
    given = {"mask_ratio": 0.5, "mask_rounding": "floor", "norm_pix_loss": False}
    found = values(model=RESNET, method="spark", decoder_width=64, **given)
    assert found == ("spark", 0.5, "floor", False, 64)


BAD = {
    "method fcmae cannot pretrain --model 'convmae_tiny'": {"model": "convmae_tiny"},
    "method mae cannot pretrain --model 'timm:test_resnet': expected spark or": {"method": "mae"},
    "method must be one of auto, mae, spark, fcmae, got 'simmim'": {"method": "simmim"},
    "densify_norm bn means nothing to --method fcmae": {"densify_norm": "bn"},
    "opt must be one of adamw, lamb, sgd, got 'adam'": {"opt": "adam"},
    "opt_betas mean nothing to --opt sgd": {"opt": "sgd", "opt_betas": (0.9, 0.99)},
    "opt_betas must be two numbers, got (0.9,)": {"opt_betas": (0.9,)},
    "opt_betas must be a number at least 0 and below 1, got 1.5": {"opt_betas": (0.9, 1.5)},
    "drop_path must be a number at least 0 and below 1, got 1": {"drop_path": 1},
    "decoder_width must be a whole number above 0, got 0": {"decoder_width": 0},
    "warmup_lr 0.0001 has no effect with --warmup_epochs 0": {
        "warmup_lr": 1e-4,
        "warmup_epochs": 0,
    },
    "warmup_lr must not be above the peak learning rate 0.001, got 1": {"warmup_lr": 1},
    "weight_decay_end must be a number at least 0": {"weight_decay_end": -1},
    "mask_rounding must be one of floor, round, got 'up'": {"mask_rounding": "up"},
    "has no network 'test_resent'; did you mean timm:test_resnet": {"model": "timm:test_resent"},
    "timm:test_vit": {"model": "timm:test_vit"},
    "input_size must be multiples of 32": {"input_size": (64, 100)},
    "mask_size must be": {"mask_size": 16},
    "mask_ratio 0.1 leaves no patch hidden of the 6": {
        "mask_ratio": 0.05,
        "mask_rounding": "round",
    },
    "mask_ratio 0.9 leaves no patch visible of the 6": {"mask_ratio": 0.9},
    "batch_size 1 gives a BatchNorm of timm:test_resnet a single visible position": {
        "batch_size": 1,
        "mask_ratio": 0.8,
    },
    "decoder_width must be a positive multiple of the stride 32": {
        "method": "spark",
        "decoder_width": 40,
    },
}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_is_refused_before_anything_is_written(
    pictures: Path, tmp_path: Path, message: str
) -> None:
    given: dict[str, Any] = BAD[message]
    message = message.replace("mask_ratio 0.1 ", "mask_ratio 0.05 ")
    with pytest.raises(OptionError) as refusal:
        pretrain(cnn(pictures, tmp_path / "run", **given))
    assert message in refusal.value.with_flags
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("mask_size", 32), ("mask_rounding", "round"), ("decoder_width", 64), ("drop_path", 0.1)],
)
def test_what_means_nothing_to_a_convmae_is_refused(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"^{name} {value} means nothing to method mae"):
        PretrainConfig(**{name: value}).validate()


# -- optimizers and schedules ---------------------------------------------------------------------


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4))


def test_the_schedule_of_spark() -> None:
    """Linear from 0.005 of the peak, down to 0.001 of it; the decay from 0.04 to 0.2, all steps."""
    peak, epochs, steps = 3.2e-3, 10, 7
    config = PretrainConfig(
        lr=peak,
        epochs=epochs,
        warmup_epochs=2,
        warmup_lr=0.005 * peak,
        min_lr=0.001 * peak,
        weight_decay=0.04,
        weight_decay_end=0.2,
    )
    groups = [
        {"params": [parameter()], "weight_decay": 0.0},
        {"params": [parameter()], "weight_decay": 0.04},
    ]
    optimizer = lamb(groups, (0.9, 0.95), 5.0)
    schedule = make_scheduler(optimizer, config, peak, steps)
    total, warm = epochs * steps, 2 * steps
    for step in range(total):
        schedule.step_update(step)
        if step < warm:
            rate = 0.005 * peak + 0.995 * peak * step / warm
        else:
            share = (step - warm) / (total - warm)
            rate = 0.001 * peak + 0.999 * peak * (0.5 + 0.5 * math.cos(math.pi * share))
        decay = 0.2 + (0.04 - 0.2) * (0.5 + 0.5 * math.cos(math.pi * step / (total - 1)))
        found = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
        assert found == [pytest.approx((rate, 0.0)), pytest.approx((rate, decay))]


def test_lamb_limits_the_gradient_itself_and_others_do_not() -> None:
    """One step of the published formulas: limit, moments, trust ratio of what is decayed."""
    weight = parameter()
    before, grad = weight.detach().clone(), torch.full((3, 4), 4.0, dtype=torch.float64)
    optimizer = lamb([{"params": [weight], "weight_decay": 0.1}], (0.9, 0.95), 5.0)
    assert clips_by_itself(optimizer) and not clips_by_itself(sgd([{"params": [weight]}]))
    assert not clips_by_itself(lamb([{"params": [weight]}], (0.9, 0.95), None))
    optimizer.param_groups[0]["lr"] = 0.01
    weight.grad = grad.clone()
    optimizer.step()
    limited = grad * 5.0 / grad.norm()
    update = limited / (limited.abs() + 1e-6) + 0.1 * before  # both moments are corrected
    trust = before.norm() / update.norm()
    torch.testing.assert_close(weight.detach(), before - 0.01 * trust * update)


# -- runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        {"opt": "lamb", "clip_grad": 5, "weight_decay_end": 0.2, "drop_path": 0.2} | SPARK,
        {"opt": "sgd", "accum_iter": 2, "batch_size": 2},
        {"model": CONVNEXT, "amp": "bfloat16", "grad_checkpointing": True} | SPARK,
    ],
    ids=["resnet-spark-lamb", "resnet-fcmae-sgd", "convnext-spark"],
)
@pytest.mark.thorough(but_every=7)
def test_interrupted_and_resumed_is_the_same_run(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    config = cnn(pictures, tmp_path / "parts", warmup_epochs=1, **given)
    pretrain(dataclasses.replace(config, output_dir=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        assert pretrain(config).interrupted
    pretrain(dataclasses.replace(config, resume="auto"))
    assert len(curve(tmp_path / "whole")) == 6
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert same(tensors(tmp_path / "parts"), tensors(tmp_path / "whole"))
    optimizers = [read_training_state(tmp_path / n)[1]["optimizer"] for n in ("parts", "whole")]
    assert optimizers[0]["state"].keys() == optimizers[1]["state"].keys()


@pytest.mark.parametrize("method", [SPARK, FCMAE], ids=["spark", "fcmae"])
def test_what_a_run_leaves(
    pictures: Path, tmp_path: Path, fcmae_run: Path, method: dict[str, Any]
) -> None:
    run = fcmae_run if method is FCMAE else tmp_path / "run"
    if method is SPARK:
        pretrain(cnn(pictures, run, **ONE_EPOCH | method))
    weights = open_weights(run)
    assert weights.model == RESNET and weights.config["method"] == method["method"]
    model = convmae.load_model(run)
    assert model.patch_size == 32 and model.grid == (2, 3) and not model.norm_pix_loss
    assert same(model.state_dict(), weights.state)
    assert (run / "report.html").exists() and list((run / "reconstructions").iterdir())
    assert "method: " + method["method"] in (run / "args.yaml").read_text()
    picture = reconstruct(
        ReconstructConfig(str(run), (str(pictures),), str(tmp_path / "painted.png"), max_images=2)
    )
    assert picture.stat().st_size > 0


@pytest.mark.thorough
def test_another_run_is_not_resumed(pictures: Path, fcmae_run: Path) -> None:
    before = sorted(path.name for path in fcmae_run.rglob("*"))
    again = ONE_EPOCH | {"resume": "auto", "epochs": 2}
    for changes in ({"model": CONVNEXT}, {"decoder_width": 32}, SPARK, {"mask_rounding": "round"}):
        with pytest.raises(OptionError, match=r"^resume: .* is a checkpoint of timm:test_resnet"):
            pretrain(cnn(pictures, fcmae_run, **again | changes))
    assert sorted(path.name for path in fcmae_run.rglob("*")) == before


def test_a_number_of_visible_blocks_rounded_otherwise(
    pictures: Path, tmp_path: Path, fcmae_run: Path
) -> None:
    """A model that is made again from the file knows it."""
    run = tmp_path / "run"
    pretrain(cnn(pictures, run, mask_rounding="round", **ONE_EPOCH))
    assert [point[2] for point in curve(run)] != [point[2] for point in curve(fcmae_run)]
    for folder, visible in ((fcmae_run, 2), (run, 3)):
        model = convmae.load_model(folder)
        assert model.make_mask(torch.zeros(1, 3, 64, 96)).num_visible == visible


@pytest.mark.thorough
def test_layers_that_no_map_depends_on_are_left_out(pictures: Path, tmp_path: Path) -> None:
    """The norm before the classifier of a ConvNeXt; a resumed run has no state for it either."""
    config = cnn(pictures, tmp_path / "run", model=CONVNEXT, epochs=1)
    pretrain(config)
    pretrain(dataclasses.replace(config, epochs=2, resume="auto"))
    _, state = read_training_state(tmp_path / "run")
    assert state["step"] == 6
    assert not any(".head.norm" in name for name in state["optimizer"]["state"])


@pytest.mark.thorough
def test_blocks_compile_one_by_one(
    pictures: Path, tmp_path: Path, fcmae_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graphs of PyTorch's compiler, run as they are: code for them takes a minute to make."""
    compile_blocks = MaskedCNN.compile_blocks
    monkeypatch.setattr(
        MaskedCNN, "compile_blocks", lambda model: compile_blocks(model, backend="eager")
    )
    compiled = tmp_path / "compiled"
    pretrain(cnn(pictures, compiled, torchcompile="blocks", **ONE_EPOCH))
    found, wanted = ([point[2] for point in curve(run)] for run in (compiled, fcmae_run))
    assert found == pytest.approx(wanted, rel=1e-5)
    assert tensors(compiled).keys() == tensors(fcmae_run).keys()
