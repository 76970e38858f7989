"""Pretraining: recipe, bad options, exact resume, checkpoints that survive, what a run leaves."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import convmae
from convmae.data import DataError
from convmae.training import (
    OptionError,
    PretrainConfig,
    ReconstructConfig,
    TrainingError,
    load_model,
    machine,
    pretrain,
    pretraining,
    reconstruct,
)
from convmae.training import checkpoint as checkpoints
from convmae.training import log as logs
from convmae.training.config import config_from_mapping, config_to_mapping
from convmae.training.optim import lr_at, make_optimiser, parameter_groups

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("torchvision")


def folder_of(path: Path, count: int, size: int = 48) -> Path:
    """A folder of `count` random pictures."""
    rng = np.random.default_rng(0)
    path.mkdir(parents=True)
    for index in range(count):
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((size, size)).save(path / f"{index:03}.png")
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("pictures") / "data", 12)


def options(pictures: Path, output: Path, **changes: Any) -> PretrainConfig:
    """A run of 2 epochs of 3 steps that takes under a second."""
    values: dict[str, Any] = {
        "model": "convmae_tiny",
        "data_path": str(pictures),
        "output_dir": str(output),
        "input_size": (32, 48),
        "batch_size": 4,
        "epochs": 2,
        "warmup_epochs": 40,
        "lr": 1e-3,
        "log_every": 1,
        "save_every": 100,
        "num_workers": 0,
        "device": "cpu",
    }
    return PretrainConfig(**(values | changes))


def curve(folder: Path) -> list[tuple[Any, ...]]:
    """What a resumed run must repeat to the last bit."""
    entries = [entry for entry in logs.read_log(folder) if "loss" in entry]
    return [(entry["step"], entry["epoch"], entry["loss"], entry["lr"]) for entry in entries]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoints.read_weights(folder, "--checkpoint").state


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def interrupt_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Sends this process SIGINT in the middle of step `steps` (from 1)."""
    accumulate, count = pretraining._accumulate, [0]

    def counting(*args: Any) -> torch.Tensor:
        count[0] += 1
        if count[0] == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return accumulate(*args)

    monkeypatch.setattr(pretraining, "_accumulate", counting)


# -- the recipe -----------------------------------------------------------------------------------


def test_base_has_105_decayed_and_206_undecayed_tensors() -> None:
    with torch.device("meta"):
        model = convmae.create_model("convmae_base")
    plain, decayed = parameter_groups(model, 0.05)
    assert (len(decayed["params"]), len(plain["params"])) == (105, 206)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    ids = {id(p) for p in decayed["params"]}
    assert id(model.mask_token) in ids
    assert id(model.pos_embed) not in ids | {id(p) for p in plain["params"]}


def test_the_optimiser_is_adamw_with_the_recipes_betas() -> None:
    optimiser = make_optimiser(convmae.create_model("convmae_tiny", img_size=32), 0.05)
    assert isinstance(optimiser, torch.optim.AdamW)
    assert all(group["betas"] == (0.9, 0.95) for group in optimiser.param_groups)


@pytest.mark.parametrize(
    ("epoch", "lr"),
    [(0, 0.0), (10, 0.25), (39.5, 0.9875), (40, 1.0), (220, 0.55), (400, 0.1), (500, 0.1)],
)
def test_schedule(epoch: float, lr: float) -> None:
    assert lr_at(epoch, peak=1.0, floor=0.1, warmup_epochs=40, epochs=400) == pytest.approx(lr)


def test_schedule_without_warmup_begins_at_the_peak() -> None:
    assert lr_at(0, 1.0, 0.0, 0, 10) == 1.0
    assert lr_at(5, 1.0, 0.0, 0, 10) == pytest.approx(0.5)


def test_learning_rate_rule() -> None:
    config = PretrainConfig(batch_size=64, accum_iter=8, blr=1.5e-4)
    assert config.effective_batch == 512
    assert config.peak_lr == pytest.approx(3e-4)
    assert dataclasses.replace(config, lr=0.01).peak_lr == 0.01


def test_defaults_are_the_official_scripts() -> None:
    config = PretrainConfig()
    assert (config.model, config.batch_size, config.epochs) == ("convmae_base", 64, 400)
    assert (config.blr, config.weight_decay, config.min_lr) == (1e-3, 0.05, 0.0)
    assert (config.warmup_epochs, config.mask_ratio, config.norm_pix_loss) == (40, 0.75, False)
    assert config.size == (224, 224)


def test_every_step_has_the_learning_rate_of_the_schedule(pictures: Path, tmp_path: Path) -> None:
    pretrain(options(pictures, tmp_path / "run", epochs=4, warmup_epochs=2, min_lr=1e-5))
    rates = [point[3] for point in curve(tmp_path / "run")]
    assert rates == [lr_at(step / 3, 1e-3, 1e-5, 2, 4) for step in range(12)]


def test_gradients_of_accumulated_batches_are_those_of_one(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one mask for all pictures: 2 batches of 2 are 1 batch of 4."""
    noise = torch.arange(6.0).expand(4, -1)
    monkeypatch.setattr(pretraining, "mask_noise", lambda n, *args, **kwargs: noise[:n])
    for name, batch, accum in (("whole", 4, 1), ("parts", 2, 2)):
        pretrain(options(pictures, tmp_path / name, batch_size=batch, accum_iter=accum, epochs=1))
    whole, parts = curve(tmp_path / "whole"), curve(tmp_path / "parts")
    assert len(whole) == len(parts) == 3
    for left, right in zip(whole, parts, strict=True):
        assert left[2] == pytest.approx(right[2], rel=1e-4)


def test_the_gradient_is_clipped_to_the_norm_asked_for(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: list[float] = []
    set_lr = pretraining.set_lr

    def noting(optimiser: torch.optim.Optimizer, lr: float) -> None:
        gradients = [p.grad for group in optimiser.param_groups for p in group["params"]]
        norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))
        set_lr(optimiser, lr)

    monkeypatch.setattr(pretraining, "set_lr", noting)
    pretrain(options(pictures, tmp_path / "free", epochs=1))
    pretrain(options(pictures, tmp_path / "clipped", epochs=1, clip_grad=0.25))
    assert min(norms[:3]) > 0.3
    assert max(norms[3:]) == pytest.approx(0.25, rel=1e-3)


# -- the same run, again and in pieces ------------------------------------------------------------


def test_the_same_seed_is_the_same_run(pictures: Path, tmp_path: Path) -> None:
    for name, changes in (("a", {}), ("b", {"num_workers": 1}), ("c", {"seed": 1})):
        pretrain(options(pictures, tmp_path / name, **changes))
    assert curve(tmp_path / "a") == curve(tmp_path / "b") != curve(tmp_path / "c")
    assert same(tensors(tmp_path / "a"), tensors(tmp_path / "b"))


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
    with pytest.raises(OptionError, match="--epochs 1: .* trained for 1 epochs already"):
        pretrain(dataclasses.replace(config, resume=str(tmp_path / "run")))


def test_resume_with_another_batch_size_goes_on_at_the_same_epoch(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = options(pictures, tmp_path / "run", epochs=1)
    pretrain(config)
    pretrain(dataclasses.replace(config, epochs=2, batch_size=6, resume="auto"))
    assert "batch_size 4 -> 6" in capsys.readouterr().out
    assert [point[:2] for point in curve(tmp_path / "run")][-1] == (4, 2.0)


# -- what is refused, before anything is written --------------------------------------------------

BAD = {
    "--mask_ratio must be in": {"mask_ratio": 1.0},
    "--mask_ratio must be in [0, 1), got -0.1": {"mask_ratio": -0.1},
    "--mask_ratio 0 leaves no patch hidden of the 6": {"mask_ratio": 0.0},
    "--mask_ratio 0.9 leaves no patch visible of the 6": {"mask_ratio": 0.9},
    "--input_size must be multiples of 16 pixels, at least 16, got 100 x 100": {"input_size": 100},
    "--input_size must be multiples of 16 pixels, at least 16, got 0 x 32": {"input_size": (0, 32)},
    "--input_size must be one whole number or two": {"input_size": (32, 32, 32)},
    "--batch_size must be a whole number above 0, got 0": {"batch_size": 0},
    "--batch_size must be a whole number above 0, got 2.5": {"batch_size": 2.5},
    "needs 13 pictures a step, but": {"batch_size": 13},
    "--batch_size 4 with --accum_iter 4 needs 16 pictures": {"accum_iter": 4},
    "--epochs must be a whole number above 0, got -1": {"epochs": -1},
    "--accum_iter must be": {"accum_iter": 0},
    "--save_every must be": {"save_every": 0},
    "--log_every must be": {"log_every": 0},
    "--lr must be a number above 0, got 0": {"lr": 0},
    "--lr must be a number above 0, got nan": {"lr": math.nan},
    "--blr must be a number above 0": {"blr": -1e-3},
    "--min_lr must not be above the peak learning rate 0.001": {"min_lr": 0.1},
    "--clip_grad must be a number above 0, got 0": {"clip_grad": 0},
    "--min_crop must be a number above 0 and at most 1, got 0": {"min_crop": 0},
    "--hflip must be a number at least 0 and at most 1, got 2": {"hflip": 2},
    "--weight_decay must be a number at least 0": {"weight_decay": -0.1},
    "--warmup_epochs must be a number at least 0": {"warmup_epochs": -1},
    "--num_workers must be a whole number at least 0": {"num_workers": -1},
    "--seed must be a whole number at least 0": {"seed": -1},
    "--max_unreadable must be a number at least 0 and at most 1": {"max_unreadable": 1.5},
    "--amp must be one of auto, bfloat16, float32, got 'fp8'": {"amp": "fp8"},
    "--device must be auto, cpu, cuda or cuda:N, got 'gpu'": {"device": "gpu"},
    "--device 'cuda:99': this machine has": {"device": "cuda:99"},
    "did you mean convmae_tiny": {"model": "convmae_tini"},
    "'convvit_base' has no decoder and cannot be pretrained; did you mean convmae_base": {
        "model": "convvit_base"
    },
    "--model must not be empty": {"model": ""},
    "--data_path 'nowhere' does not exist": {"data_path": "nowhere"},
    "--resume 'nowhere' does not exist": {"resume": "nowhere"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_options_are_refused_before_anything_is_written(
    pictures: Path, tmp_path: Path, message: str
) -> None:
    with pytest.raises(ValueError) as error:
        pretrain(options(pictures, tmp_path / "run", **BAD[message]))
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no picture"):
        pretrain(options(tmp_path / "empty", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_an_output_folder_that_is_a_file_is_refused(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(OptionError, match=r"--output_dir .* is a file, not a folder"):
        pretrain(options(pictures, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_another_run_is_not_overwritten(pictures: Path, tmp_path: Path) -> None:
    pretrain(options(pictures, tmp_path / "a", epochs=1))
    pretrain(options(pictures, tmp_path / "b", epochs=1))
    before = contents(tmp_path / "a")
    with pytest.raises(OptionError, match=r"already holds a run .*--resume auto"):
        pretrain(options(pictures, tmp_path / "a"))
    with pytest.raises(OptionError, match="holds another run than --resume"):
        pretrain(options(pictures, tmp_path / "a", resume=str(tmp_path / "b")))
    assert contents(tmp_path / "a") == before


@pytest.mark.parametrize(
    ("changes", "mine"),
    [
        ({"model": "convmae_small"}, "convmae_small ("),
        ({"input_size": 64}, "img_size=[64, 64]"),
        ({"norm_pix_loss": True}, "norm_pix_loss=True"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_both_are_named(
    pictures: Path, tmp_path: Path, changes: dict[str, Any], mine: str
) -> None:
    pretrain(options(pictures, tmp_path / "run", epochs=1))
    before = contents(tmp_path / "run")
    with pytest.raises(OptionError) as error:
        pretrain(options(pictures, tmp_path / "run", resume="auto", **changes))
    message = str(error.value)
    assert "is a checkpoint of convmae_tiny (" in message
    assert "img_size=[32, 48]" in message and mine in message
    assert contents(tmp_path / "run") == before


def test_damaged_and_partial_checkpoints_are_told(pictures: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrain(options(pictures, run, epochs=1))
    state, weights = (
        run / "checkpoint" / name for name in (checkpoints.STATE, checkpoints.WEIGHTS)
    )
    good = state.read_bytes()
    state.write_bytes(good[:1000])
    with pytest.raises(OptionError, match=r"training_state.pt is damaged"):
        pretrain(options(pictures, run, resume="auto"))
    state.unlink()
    with pytest.raises(OptionError, match=r"holds weights only"):
        pretrain(options(pictures, run, resume="auto"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(OptionError, match=r"not readable as safetensors"):
        load_model(run)


# -- unreadable pictures --------------------------------------------------------------------------


def test_few_unreadable_pictures_are_named_and_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder_of(tmp_path / "data" / "nested", 12)
    (data / "005.png").write_text("broken")
    summary = pretrain(options(tmp_path / "data", tmp_path / "run", epochs=1))
    assert list(summary.unreadable) == [str(data / "005.png")]
    assert summary.steps == 3
    assert "skipped unreadable picture" in capsys.readouterr().out
    events = [e for e in logs.read_log(tmp_path / "run") if e.get("event") == "unreadable"]
    assert [(e["path"], e["reason"]) for e in events] == [
        (str(data / "005.png"), "not a picture that Pillow knows")
    ]


def test_too_many_unreadable_pictures_stop_the_run_before_it_begins(tmp_path: Path) -> None:
    data = folder_of(tmp_path / "data", 12)
    for index in (3, 7):
        (data / f"{index:03}.png").write_text("broken")
    message = r"2 of 12 pictures cannot be read \(16.7%\), more than --max_unreadable 0.1 .*003.png"
    with pytest.raises(DataError, match=message):
        pretrain(options(data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    assert pretrain(options(data, tmp_path / "run", epochs=1, max_unreadable=0.2)).steps == 3


@pytest.mark.parametrize("num_workers", [0, 1])
def test_pictures_that_only_fail_when_decoded_stop_the_run_too(
    tmp_path: Path, num_workers: int
) -> None:
    """A JPEG cut short passes the check of headers."""
    data = folder_of(tmp_path / "data", 8)
    for index in range(8):
        path = data / f"{index:03}.jpg"
        Image.open(data / f"{index:03}.png").resize((256, 256)).save(path)
        (data / f"{index:03}.png").unlink()
        if index < 6:
            path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DataError, match=r"of 8 pictures cannot be read .*--max_unreadable"):
        pretrain(options(data, tmp_path / "run", num_workers=num_workers))


def test_a_train_folder_is_read_alone(tmp_path: Path) -> None:
    folder_of(tmp_path / "data" / "train" / "class", 8)
    folder_of(tmp_path / "data" / "val" / "class", 8)
    assert pretrain(options(tmp_path / "data", tmp_path / "run", epochs=1)).steps == 2


# -- checkpoints ----------------------------------------------------------------------------------


def fail(*args: Any, **kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


def fail_call(function: Callable[..., Any], number: int) -> Callable[..., Any]:
    """`function`, but call `number` (from 1) fails."""
    calls = [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return fail() if calls[0] == number else function(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize("where", ["weights", "state", "fsync", "replace-1", "replace-2"])
def test_a_failed_save_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    import safetensors.torch

    model = convmae.create_model("convmae_tiny", img_size=32)
    checkpoints.save_checkpoint(tmp_path, model, "convmae_tiny", {"step": 1})
    before = contents(tmp_path)
    torch.nn.init.ones_(model.mask_token)
    with monkeypatch.context() as patch:
        if where == "weights":
            patch.setattr(safetensors.torch, "save_file", fail)
        elif where == "state":
            patch.setattr(checkpoints.torch, "save", fail)
        elif where == "fsync":
            patch.setattr(checkpoints.os, "fsync", fail)
        else:
            number = int(where.partition("-")[2])
            patch.setattr(checkpoints.os, "replace", fail_call(os.replace, number))
        with pytest.raises(OSError, match="No space left"):
            checkpoints.save_checkpoint(tmp_path, model, "convmae_tiny", {"step": 2})
    kept = {name: data for name, data in contents(tmp_path).items() if not name.startswith(".")}
    assert kept == before
    checkpoints.save_checkpoint(tmp_path, model, "convmae_tiny", {"step": 3})
    weights, state = checkpoints.read_training_state(tmp_path)
    assert state["step"] == 3 and bool((weights.state["mask_token"] == 1).all())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint"]


def test_a_crash_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    model = convmae.create_model("convmae_tiny", img_size=32)
    checkpoints.save_checkpoint(tmp_path, model, "convmae_tiny", {"step": 1})
    (tmp_path / "checkpoint").rename(tmp_path / ".checkpoint.old")
    for path in (tmp_path, tmp_path / "checkpoint"):
        assert checkpoints.read_training_state(path)[1]["step"] == 1
    checkpoints.save_checkpoint(tmp_path, model, "convmae_tiny", {"step": 2})
    assert checkpoints.read_training_state(tmp_path)[1]["step"] == 2


def test_a_failed_save_ends_the_run_with_the_reason(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain(options(pictures, tmp_path / "run", epochs=1))
    before = tensors(tmp_path / "run")
    monkeypatch.setattr(checkpoints.torch, "save", fail)
    with pytest.raises(TrainingError, match="step 6 could not be written.*No space left.*intact"):
        pretrain(options(pictures, tmp_path / "run", epochs=2, resume="auto"))
    assert same(tensors(tmp_path / "run"), before)


def test_weights_rebuild_their_model(pictures: Path, tmp_path: Path) -> None:
    pretrain(options(pictures, tmp_path / "run", epochs=1, norm_pix_loss=True))
    folder = tmp_path / "run" / "checkpoint"
    for path in (tmp_path / "run", folder, folder / checkpoints.WEIGHTS):
        model = load_model(path)
        assert model.config["norm_pix_loss"] is True
        assert tuple(model.img_size) == (32, 48)
        assert same(dict(model.state_dict()), tensors(folder))


def test_save_every_keeps_the_last_epoch_too(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    save = pretraining.save_checkpoint

    def noting(run: Path, model: Any, name: str, state: dict[str, Any]) -> Path:
        saved.append(state["step"])
        return save(run, model, name, state)

    monkeypatch.setattr(pretraining, "save_checkpoint", noting)
    pretrain(options(pictures, tmp_path / "run", epochs=5, save_every=2))
    assert saved == [6, 12, 15]


# -- losses that are no numbers -------------------------------------------------------------------


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_the_run(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    accumulate, count = pretraining._accumulate, [0]

    def breaking(run: Any, images: torch.Tensor, number: int) -> torch.Tensor:
        count[0] += 1
        loss = accumulate(run, images, number)
        if where == "loss" and count[0] == 5:
            loss = loss * math.nan
        if where == "gradient" and count[0] == 6:  # the loss of the epoch's last step is still fine
            run.model.mask_token.grad.fill_(math.inf)
        return loss

    monkeypatch.setattr(pretraining, "_accumulate", breaking)
    step = {"loss": "not finite at step 5 of 6", "gradient": "not finite after step 6"}[where]
    with pytest.raises(TrainingError, match=f"{step}.*checkpoint before is intact.*lower --blr"):
        pretrain(options(pictures, tmp_path / "run", lr=1e-4, save_every=1))
    left = tensors(tmp_path / "run")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in left.values())
    assert checkpoints.read_training_state(tmp_path / "run")[1]["step"] == 3


# -- arithmetic -----------------------------------------------------------------------------------


def test_auto_takes_bfloat16_only_where_it_is_native(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for flags, wanted in (({"avx2"}, torch.float32), ({"amx_bf16", "avx2"}, torch.bfloat16)):
        monkeypatch.setattr(machine, "_cpu_flags", lambda flags=flags: flags)
        assert machine.pick_dtype("auto", cpu)[0] == wanted
        assert machine.pick_dtype("float32", cpu)[0] == torch.float32
        assert machine.pick_dtype("bfloat16", cpu)[0] == torch.bfloat16


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
    assert set(entries[0]) == {"step", "epoch", "loss", "lr", "images_per_s", "seconds"}
    with Image.open(run / "reconstruction.png") as picture:
        assert picture.size == (6 + 4 * (192 + 6), 26 + 6 * (192 + 6) + 6)
        assert np.asarray(picture).std() > 20
    with Image.open(run / "loss.png") as picture:
        assert picture.size == (840, 480)
    assert list((run / "tensorboard").glob("events*"))
    yaml = pytest.importorskip("yaml")
    stored = yaml.safe_load((run / "args.yaml").read_text())
    assert config_from_mapping(stored) == dataclasses.replace(config, warmup_epochs=0, log_every=5)


def test_tensorboard_has_scalars_and_pictures(pictures: Path, tmp_path: Path) -> None:
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pretrain(options(pictures, tmp_path / "run"))
    events = loading.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/lr", "train/images_per_s"}
    assert events.Tags()["images"] == ["reconstruction"]
    losses = [scalar.value for scalar in events.Scalars("train/loss")]
    assert losses == pytest.approx([point[2] for point in curve(tmp_path / "run")])


@pytest.mark.parametrize("norm_pix_loss", [False, True])
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
        ("--checkpoint 'nowhere' does not exist", {"checkpoint": "nowhere"}),
        ("does not name its model", {"checkpoint": str(tmp_path / "bare.safetensors")}),
        ("does not fit the model it names", {"checkpoint": str(tmp_path / "other.safetensors")}),
        ("--images 'nowhere' does not exist", {"images": ("nowhere",)}),
        ("--images needs at least one", {"images": ()}),
        ("--mask_ratio must be in", {"mask_ratio": 2.0}),
        ("leaves no patch hidden", {"mask_ratio": 0.0}),
        ("--output must end in .png", {"output": "out.txt"}),
        ("--max_images must be", {"max_images": 0}),
    ]
    for message, changes in bad:
        with pytest.raises(ValueError) as error:
            reconstruct(dataclasses.replace(good, **changes))
        assert message in str(error.value)


def test_options_survive_yaml() -> None:
    config = PretrainConfig(input_size=(32, 64), lr=1e-5, num_workers=3)
    assert config_from_mapping(config_to_mapping(config)) == config
    assert config_from_mapping({"mask-ratio": 0.5, "lr": "1e-3"}).lr == 1e-3
    with pytest.raises(
        OptionError, match=r"unknown option 'mask_ration' .*did you mean mask_ratio"
    ):
        config_from_mapping({"mask_ration": 0.5})
