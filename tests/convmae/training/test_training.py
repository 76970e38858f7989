"""Pretraining: recipe, exact resume, arithmetic, what a run leaves."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import convmae
from convmae import (
    FinetuneConfig,
    LinprobeConfig,
    OptionError,
    PretrainConfig,
    ReconstructConfig,
    pretrain,
    reconstruct,
)
from convmae.config import config_from_mapping, config_to_mapping
from convmae.config.pretrain import BETAS
from convmae.records import log as logs
from convmae.training import machine
from convmae.training.optim import adamw, decay_groups, make_scheduler
from tests.support.paths import RECIPES
from tests.support.training_runs import curve, interrupt_after, options, same, tensors

if TYPE_CHECKING:
    from pathlib import Path

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("torchvision")


# -- the recipe -----------------------------------------------------------------------------------


def test_base_has_105_decayed_and_206_undecayed_tensors() -> None:
    with torch.device("meta"):
        model = convmae.create_model("convmae_base")
    plain, decayed = decay_groups(model, 0.05)
    assert (len(decayed["params"]), len(plain["params"])) == (105, 206)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    ids = {id(p) for p in decayed["params"]}
    assert id(model.mask_token) in ids
    assert id(model.pos_embed) not in ids | {id(p) for p in plain["params"]}


def test_the_optimizer_is_adamw_with_the_recipes_betas() -> None:
    model = convmae.create_model("convmae_tiny", img_size=32)
    optimizer = adamw(decay_groups(model, 0.05), BETAS)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert all(group["betas"] == (0.9, 0.95) for group in optimizer.param_groups)


def official_lr(epoch: float, config: PretrainConfig) -> float:
    """Linear to the peak, then a half-cosine to the floor, with fractions of epochs."""
    peak, floor, warmup = config.peak_lr(), config.min_lr, config.warmup_epochs
    if epoch < warmup:
        return peak * epoch / warmup
    share = (epoch - warmup) / (config.epochs - warmup)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * share))


def rates(config: PretrainConfig, steps_per_epoch: int, steps: list[int]) -> list[float]:
    """Learning rates of some steps of a schedule, by the scheduler that a run uses."""
    optimizer = adamw([{"params": [torch.nn.Parameter(torch.zeros(2))]}], BETAS)
    scheduler = make_scheduler(optimizer, config, config.peak_lr(), steps_per_epoch)
    found = []
    for step in steps:
        scheduler.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize(
    "config",
    [
        PretrainConfig(batch_size=3072, epochs=1600, blr=1.5e-4),  # ConvMAE
        PretrainConfig(batch_size=512, epochs=50, blr=6e-4, warmup_epochs=10),  # FastConvMAE
        FinetuneConfig(batch_size=1024),
        LinprobeConfig(batch_size=4096),
    ],
    ids=["pretrain", "fast", "finetune", "linprobe"],
)
def test_schedules_are_the_official_ones(config: Any) -> None:
    """At 5 points: the start, within the warm-up, its end, half-way, the last step."""
    steps_per_epoch = 1_281_167 // config.batch_size
    last = config.epochs * steps_per_epoch
    warm = int(config.warmup_epochs * steps_per_epoch)
    steps = [0, warm // 3, warm, (warm + last) // 2, last - 1]
    wanted = [official_lr(step / steps_per_epoch, config) for step in steps]
    assert rates(config, steps_per_epoch, steps) == pytest.approx(wanted, rel=1e-9)


def test_peak_rates_of_the_official_recipes() -> None:
    peaks = {
        "convmae-base_pretrain_1600e": (24, 1.8e-3),
        "fastconvmae-base_pretrain_50e": (8, 1.2e-3),
        "convvit-base_finetune_100e": (8, 2e-3),
        "convvit-base_linprobe_90e": (8, 1.6),
    }
    yaml = pytest.importorskip("yaml")
    kinds = {"pretrain": PretrainConfig, "finetune": FinetuneConfig, "linprobe": LinprobeConfig}
    for name, (processes, peak) in peaks.items():
        values = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
        config: Any = config_from_mapping(kinds[name.split("_")[1]], values)
        config.validate()
        assert config.peak_lr(processes) == pytest.approx(peak)


def test_other_schedules() -> None:
    config = PretrainConfig(epochs=10, lr=1.0, min_lr=0.2, warmup_epochs=2, sched="linear")
    steps = [0, 1, 2, 6, 10]
    assert rates(config, 1, steps) == pytest.approx([0, 0.5, 1.0, 0.6, 0.2])
    config = dataclasses.replace(config, sched="constant")
    assert rates(config, 1, steps) == pytest.approx([0, 0.5, 1.0, 1.0, 1.0])
    config = dataclasses.replace(config, sched="cosine", warmup_epochs=0)
    assert rates(config, 1, [0, 5]) == pytest.approx([1.0, 0.6])


def test_learning_rate_rule() -> None:
    config = PretrainConfig(batch_size=64, accum_iter=8, blr=1.5e-4)
    assert config.effective_batch() == 512 and config.effective_batch(2) == 1024
    assert config.peak_lr() == pytest.approx(3e-4)
    assert config.peak_lr(2) == pytest.approx(6e-4)
    assert dataclasses.replace(config, lr=0.01).peak_lr() == 0.01


def test_defaults_are_the_official_scripts() -> None:
    config = PretrainConfig().filled()
    assert (config.model, config.batch_size, config.epochs) == ("convmae_base", 64, 400)
    assert (config.blr, config.weight_decay, config.min_lr) == (1e-3, 0.05, 0.0)
    assert (config.warmup_epochs, config.mask_ratio, config.norm_pix_loss) == (40, 0.75, False)
    assert config.size == (224, 224)


def test_every_step_has_the_learning_rate_of_the_schedule(pictures: Path, tmp_path: Path) -> None:
    config = options(pictures, tmp_path / "run", epochs=4, warmup_epochs=2, min_lr=1e-5)
    pretrain(config)
    found = [point[3] for point in curve(tmp_path / "run")]
    assert found == pytest.approx([official_lr(step / 3, config) for step in range(12)])


def test_gradients_of_accumulated_batches_are_those_of_one(pictures: Path, tmp_path: Path) -> None:
    """2 batches of 2 are 1 batch of 4: a picture's mask does not depend on its batch."""
    for name, batch, accum in (("whole", 4, 1), ("parts", 2, 2)):
        sizes = {"batch_size": batch, "accum_iter": accum, "amp": "float32"}
        pretrain(options(pictures, tmp_path / name, epochs=1, **sizes))
    whole, parts = curve(tmp_path / "whole"), curve(tmp_path / "parts")
    assert len(whole) == len(parts) == 3
    for left, right in zip(whole, parts, strict=True):
        assert left[2] == pytest.approx(right[2], rel=1e-6)


def test_the_gradient_is_clipped_to_the_norm_asked_for(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: list[float] = []
    step = torch.optim.AdamW.step

    def noting(optimizer: torch.optim.Optimizer, *args: Any) -> Any:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(float(torch.stack([g.norm() for g in gradients if g is not None]).norm()))
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    pretrain(options(pictures, tmp_path / "free", epochs=1, save_every=100))
    pretrain(options(pictures, tmp_path / "clipped", epochs=1, clip_grad=0.25))
    assert min(norms[:3]) > 0.3
    assert max(norms[3:]) == pytest.approx(0.25, rel=1e-3)
    logged = [e["grad_norm"] for e in logs.read_log(tmp_path / "free") if "loss" in e]
    assert logged == pytest.approx(norms[:3])


# -- the same run, again and in pieces ------------------------------------------------------------


def test_the_same_seed_is_the_same_run(pictures: Path, tmp_path: Path) -> None:
    for name, changes in (("a", {}), ("b", {"num_workers": 1}), ("c", {"seed": 1})):
        pretrain(options(pictures, tmp_path / name, **changes))
    assert curve(tmp_path / "a") == curve(tmp_path / "b") != curve(tmp_path / "c")
    assert same(tensors(tmp_path / "a"), tensors(tmp_path / "b"))


@pytest.mark.thorough(but_every=3)
@pytest.mark.parametrize("log_every", [1, 4])
def test_n_epochs_and_n_more_are_2n(pictures: Path, tmp_path: Path, log_every: int) -> None:
    """In the warm-up the schedule does not know how long the run is."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pretrain(options(pictures, whole, epochs=4, log_every=log_every))
    pretrain(options(pictures, parts, epochs=2, log_every=log_every))
    pretrain(options(pictures, parts, epochs=4, log_every=log_every, resume="auto"))
    wanted = curve(whole)
    assert len(wanted) == 12 // log_every
    assert [point for point in curve(parts) if point[0] != 6 or log_every == 1] == wanted
    assert same(tensors(whole), tensors(parts))


def test_interrupted_in_an_epoch_and_resumed_is_the_same_run(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = options(pictures, tmp_path / "parts", epochs=3, warmup_epochs=1, log_every=2)
    pretrain(dataclasses.replace(config, output_dir=str(tmp_path / "whole")))
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        summary = pretrain(config)
    assert summary.interrupted and summary.steps == 5
    assert signal.getsignal(signal.SIGINT) is before
    summary = pretrain(dataclasses.replace(config, resume=str(tmp_path / "parts" / "checkpoint")))
    assert not summary.interrupted and summary.steps == 9
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert same(tensors(tmp_path / "parts"), tensors(tmp_path / "whole"))


def test_lines_after_the_checkpoint_are_not_logged_twice(pictures: Path, tmp_path: Path) -> None:
    config = options(pictures, tmp_path / "run", epochs=2)
    pretrain(config)
    with (tmp_path / "run" / "log.txt").open("a") as log:  # as a run that crashed had left them
        log.write('{"step": 7, "epoch": 2.3, "loss": 9.0, "lr": 0.1}\n{"step": 8, "los')
    pretrain(dataclasses.replace(config, epochs=3, resume="auto"))
    assert [point[0] for point in curve(tmp_path / "run")] == list(range(1, 10))


def test_auto_starts_afresh_where_there_is_nothing_and_ends_where_all_is_done(
    pictures: Path, tmp_path: Path
) -> None:
    config = options(pictures, tmp_path / "run", epochs=1, resume="auto")
    assert pretrain(config).steps == 3
    before = curve(tmp_path / "run")
    assert pretrain(config).steps == 3
    assert curve(tmp_path / "run") == before
    with pytest.raises(OptionError, match="epochs 1: .* trained for 1 epochs already"):
        pretrain(dataclasses.replace(config, resume=str(tmp_path / "run")))


def test_resume_with_another_batch_size_goes_on_at_the_same_epoch(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = options(pictures, tmp_path / "run", epochs=1)
    pretrain(config)
    pretrain(dataclasses.replace(config, epochs=2, batch_size=6, resume="auto"))
    assert "batch_size 4 -> 6" in capsys.readouterr().out
    assert [point[:2] for point in curve(tmp_path / "run")][-1] == (4, 2.0)


# -- arithmetic -----------------------------------------------------------------------------------


def test_auto_takes_bfloat16_only_where_it_is_native(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for flags, wanted in (({"avx2"}, torch.float32), ({"amx_bf16", "avx2"}, torch.bfloat16)):
        monkeypatch.setattr(machine, "_cpu_flags", lambda flags=flags: flags)
        assert machine.pick_dtype("auto", cpu)[0] == wanted
        assert machine.pick_dtype("float32", cpu)[0] == torch.float32
        assert machine.pick_dtype("bfloat16", cpu)[0] == torch.bfloat16
        assert machine.pick_dtype("float16", cpu)[0] == torch.float16
    gpu = torch.device("cuda:0")
    for native, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(machine, "native_bfloat16", lambda _, n=native: (n, "a GPU"))
        assert machine.pick_dtype("auto", gpu)[0] == dtype


def test_bfloat16_trains_near_float32(pictures: Path, tmp_path: Path) -> None:
    for amp in ("float32", "bfloat16"):
        pretrain(options(pictures, tmp_path / amp, epochs=1, amp=amp))
    left, right = curve(tmp_path / "float32"), curve(tmp_path / "bfloat16")
    assert left != right
    for a, b in zip(left, right, strict=True):
        assert a[2] == pytest.approx(b[2], rel=0.05)
    assert all(tensor.dtype == torch.float32 for tensor in tensors(tmp_path / "bfloat16").values())


# -- what a run leaves ----------------------------------------------------------------------------


def test_the_demo_trains_and_leaves_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    config = options(tmp_path, run, data_path="demo", input_size=64, batch_size=32, epochs=1)
    summary = pretrain(dataclasses.replace(config, warmup_epochs=0, log_every=5))
    assert (summary.steps, summary.epochs) == (16, 1.0)
    assert summary.last_loss < summary.first_loss
    assert summary.images_per_s > 0
    text = capsys.readouterr().out
    assert "8 photographs" in text and "lr 1.000e-03 (as given)" in text and "left" in text
    entries = logs.read_log(run)
    assert [entry["step"] for entry in entries] == [5, 10, 15, 16]
    rates = {"images_per_s", "model_images_per_s", "input_images_per_s"}
    assert set(entries[0]) == rates | {
        "step",
        "epoch",
        "loss",
        "lr",
        "grad_norm",
        "bottleneck",
        "memory_mib",
        "seconds",
    }
    assert all(entry[name] > 0 for entry in entries for name in rates)
    assert {entry["bottleneck"] for entry in entries} <= {"model", "input"}
    environment = json.loads((run / "environment.json").read_text())
    assert environment["command"] == "pretrain" and environment["processes"] == "1 (single)"
    assert "finished" in (run / "report.html").read_text()
    drawn = sorted((run / "reconstructions").rglob("*.*"))
    assert [path.name for path in drawn] == ["step-00000016.webp", "step-00000016.png"]
    with Image.open(run / "reconstruction.png") as picture:
        assert picture.size == (6 + 4 * (192 + 6), 26 + 6 * (192 + 6) + 6)
        assert np.asarray(picture).std() > 20
    with Image.open(run / "loss.png") as picture:
        assert picture.size == (840, 480)
    assert list((run / "tensorboard").glob("events*"))
    yaml = pytest.importorskip("yaml")
    stored = yaml.safe_load((run / "args.yaml").read_text())
    assert config_from_mapping(PretrainConfig, stored) == dataclasses.replace(
        config.filled(), warmup_epochs=0, log_every=5
    )


@pytest.mark.thorough
def test_tensorboard_has_scalars_and_pictures(pictures: Path, tmp_path: Path) -> None:
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pretrain(options(pictures, tmp_path / "run"))
    events = loading.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    names = {"loss", "lr", "grad_norm", "memory_mib"}
    names |= {"images_per_s", "model_images_per_s", "input_images_per_s"}
    assert set(events.Tags()["scalars"]) == {f"train/{name}" for name in names}
    assert events.Tags()["images"] == ["reconstruction"]
    losses = [scalar.value for scalar in events.Scalars("train/loss")]
    assert losses == pytest.approx([point[2] for point in curve(tmp_path / "run")])


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.thorough(but_every=2)
def test_reconstruct_draws_from_a_checkpoint(
    pictures: Path, tmp_path: Path, norm_pix_loss: bool
) -> None:
    pretrain(options(pictures, tmp_path / "run", epochs=1, norm_pix_loss=norm_pix_loss))
    config = ReconstructConfig(
        checkpoint=str(tmp_path / "run"),
        images=(str(pictures / "000.png"), str(pictures)),
        output=str(tmp_path / "new" / "out.png"),
        mask_ratio=0.5,
        max_images=5,
    )
    assert reconstruct(config) == tmp_path / "new" / "out.png"
    first = (tmp_path / "new" / "out.png").read_bytes()
    footer = 22 if norm_pix_loss else 0
    with Image.open(tmp_path / "new" / "out.png") as picture:
        assert picture.size == (6 + 4 * (192 + 6), 26 + 5 * (128 + 6) + 6 + footer)
    reconstruct(config)
    assert (tmp_path / "new" / "out.png").read_bytes() == first
    reconstruct(dataclasses.replace(config, seed=1))
    assert (tmp_path / "new" / "out.png").read_bytes() != first


def test_reconstruct_refuses_what_it_cannot_use(pictures: Path, tmp_path: Path) -> None:
    pretrain(options(pictures, tmp_path / "run", epochs=1))
    good = ReconstructConfig(str(tmp_path / "run"), (str(pictures),), str(tmp_path / "out.png"))
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"a": torch.zeros(2)}, tmp_path / "bare.safetensors")
    other = {"model": "convmae_tiny", "config": json.dumps({"img_size": 32})}
    safetensors.save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors", metadata=other)
    bad: list[tuple[str, dict[str, Any]]] = [
        ("checkpoint 'nowhere' does not exist", {"checkpoint": "nowhere"}),
        ("is not of a ConvMAE", {"checkpoint": str(tmp_path / "bare.safetensors")}),
        ("does not fit the model it names", {"checkpoint": str(tmp_path / "other.safetensors")}),
        ("images 'nowhere' does not exist", {"images": ("nowhere",)}),
        ("images needs at least one", {"images": ()}),
        ("mask_ratio must be in", {"mask_ratio": 2.0}),
        ("leaves no patch hidden", {"mask_ratio": 0.0}),
        ("output must end in .png", {"output": "out.txt"}),
        ("max_images must be", {"max_images": 0}),
    ]
    for message, changes in bad:
        with pytest.raises(ValueError) as error:
            reconstruct(dataclasses.replace(good, **changes))
        assert message in str(error.value)


def test_options_survive_yaml() -> None:
    config = PretrainConfig(input_size=(32, 64), lr=1e-5, num_workers=3)
    assert config_from_mapping(PretrainConfig, config_to_mapping(config)) == config
    assert config_from_mapping(PretrainConfig, {"mask-ratio": 0.5, "lr": "1e-3"}).lr == 1e-3
    with pytest.raises(
        OptionError, match=r"unknown option 'mask_ration' .*did you mean mask_ratio"
    ):
        config_from_mapping(PretrainConfig, {"mask_ration": 0.5})
