"""Pretraining that goes wrong: bad options, unreadable pictures, full disks, losses of NaN."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

import pytest
import torch

import convmae
from convmae import OptionError, TrainingError, WeightsError, load_model, pretrain
from convmae.data import DataError
from convmae.records import log as logs
from convmae.training import saving, step
from convmae.weights import checkpoint as checkpoints
from tests.support.training_runs import folder_of, options, same, tensors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("torchvision")

pytestmark = pytest.mark.thorough(but_every=3)  # a sample of long sweeps


# -- what is refused, before anything is written --------------------------------------------------

BAD = {
    "mask_ratio must be in": {"mask_ratio": 1.0},
    "mask_ratio must be in [0, 1), got -0.1": {"mask_ratio": -0.1},
    "mask_ratio 0 leaves no patch hidden of the 6": {"mask_ratio": 0.0},
    "mask_ratio 0.9 leaves no patch visible of the 6": {"mask_ratio": 0.9},
    "input_size must be multiples of 16 pixels, at least 16, got 100 x 100": {"input_size": 100},
    "input_size must be multiples of 16 pixels, at least 16, got 0 x 32": {"input_size": (0, 32)},
    "input_size must be one whole number or two": {"input_size": (32, 32, 32)},
    "batch_size must be a whole number above 0, got 0": {"batch_size": 0},
    "batch_size must be a whole number above 0, got 2.5": {"batch_size": 2.5},
    "needs 13 pictures a step, but": {"batch_size": 13},
    "batch_size 4 with accum_iter 4 needs 16 pictures": {"accum_iter": 4},
    "epochs must be a whole number above 0, got -1": {"epochs": -1},
    "accum_iter must be": {"accum_iter": 0},
    "save_every must be": {"save_every": 0},
    "log_every must be": {"log_every": 0},
    "lr must be a number above 0, got 0": {"lr": 0},
    "lr must be a number above 0, got nan": {"lr": math.nan},
    "blr must be a number above 0": {"blr": -1e-3},
    "min_lr must not be above the peak learning rate 0.001": {"min_lr": 0.1},
    "clip_grad must be a number above 0, got 0": {"clip_grad": 0},
    "min_crop must be a number above 0 and at most 1, got 0": {"min_crop": 0},
    "hflip must be a number at least 0 and at most 1, got 2": {"hflip": 2},
    "weight_decay must be a number at least 0": {"weight_decay": -0.1},
    "warmup_epochs must be a number at least 0": {"warmup_epochs": -1},
    "num_workers must be a whole number at least 0": {"num_workers": -1},
    "seed must be a whole number at least 0": {"seed": -1},
    "max_unreadable must be a number at least 0 and at most 1": {"max_unreadable": 1.5},
    "max_nonfinite must be a whole number above 0, got 0": {"max_nonfinite": 0},
    "max_samples must be": {"max_samples": 0},
    "sched must be one of cosine, linear, constant, got 'step'": {"sched": "step"},
    "strategy must be one of auto, single, ddp, fsdp2, got 'dp'": {"strategy": "dp"},
    "strategy fsdp2 needs processes: torchrun": {"strategy": "fsdp2"},
    "mask_ratio: mask_ratio = 0.3 leaves groups of 4 of 6 patches, expected a divisor of 6": {
        "model": "fastconvmae_tiny",
        "mask_ratio": 0.3,
    },
    "amp must be one of auto, bfloat16, float16, float32, got 'fp8'": {"amp": "fp8"},
    "device must be auto, cpu, cuda or cuda:N, got 'gpu'": {"device": "gpu"},
    "device 'cuda:99': this machine has": {"device": "cuda:99"},
    "did you mean convmae_tiny": {"model": "convmae_tini"},
    "'convvit_base' has no decoder and cannot be pretrained; did you mean convmae_base": {
        "model": "convvit_base"
    },
    "model must not be empty": {"model": ""},
    "data_path 'nowhere' does not exist": {"data_path": "nowhere"},
    "resume 'nowhere' does not exist": {"resume": "nowhere"},
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
    with pytest.raises(OptionError, match=r"output_dir .* is a file, not a folder"):
        pretrain(options(pictures, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_another_run_is_not_overwritten(pictures: Path, tmp_path: Path) -> None:
    pretrain(options(pictures, tmp_path / "a", epochs=1))
    pretrain(options(pictures, tmp_path / "b", epochs=1))
    before = contents(tmp_path / "a")
    with pytest.raises(OptionError, match=r"already holds a run .*resume auto"):
        pretrain(options(pictures, tmp_path / "a"))
    with pytest.raises(OptionError, match="holds another run than resume"):
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
    with pytest.raises(WeightsError, match=r"not readable as safetensors"):
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
    message = r"2 of 12 pictures cannot be read \(16.7%\), more than max_unreadable 0.1 .*003.png"
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
    with pytest.raises(DataError, match=r"of 8 pictures cannot be read .*max_unreadable"):
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
            patch.setattr(torch, "save", fail)
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
    monkeypatch.setattr(torch, "save", fail)
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


@pytest.mark.thorough
def test_save_every_keeps_the_last_epoch_too(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    save = saving.save_checkpoint

    def noting(run: Path, model: Any, name: str, state: dict[str, Any], *args: Any, **more: Any):
        saved.append(state["step"])
        return save(run, model, name, state, *args, **more)

    monkeypatch.setattr(saving, "save_checkpoint", noting)
    pretrain(options(pictures, tmp_path / "run", epochs=5, save_every=2))
    assert saved == [6, 12, 15]
    saved.clear()
    pretrain(options(pictures, tmp_path / "often", epochs=1, save_every=0.34))  # a third of 3 steps
    assert saved == [1, 2, 3]


# -- losses that are no numbers -------------------------------------------------------------------


def break_steps(
    monkeypatch: pytest.MonkeyPatch, where: str, steps: set[int], value: float = math.nan
) -> None:
    """Spoils the loss, a gradient or a weight in the steps given, counted from 1 by calls."""
    backward, count = step.backward, [0]

    def breaking(run: Any, task: Any, batch: Any, *args: Any) -> torch.Tensor:
        count[0] += 1
        if where == "weight" and count[0] in steps:
            run.model.blocks1[0].conv1.weight.data[0, 0] = value
        loss = backward(run, task, batch, *args)
        if where == "loss" and count[0] in steps:
            loss = loss * value
        if where == "gradient" and count[0] in steps:
            run.model.mask_token.grad.fill_(value)
        return loss

    monkeypatch.setattr(step, "backward", breaking)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: str,
) -> None:
    break_steps(monkeypatch, where, {3, 4}, math.inf)
    summary = pretrain(options(pictures, tmp_path / "run", epochs=2, max_nonfinite=3))
    assert (summary.steps, summary.skipped) == (6, 2)
    entries = logs.read_log(tmp_path / "run")
    events = [e for e in entries if e.get("event") == "nonfinite"]
    assert [e["step"] for e in events] == [3, 4]
    assert {e["loss" if where == "loss" else "grad_norm"] for e in events} == {"inf"}
    assert [e["step"] for e in entries if "loss" in e and "event" not in e] == [1, 2, 5, 6]
    assert "skipped step 3, not finite" in capsys.readouterr().out
    assert all(bool(t.isfinite().all()) for t in tensors(tmp_path / "run").values())
    assert checkpoints.read_training_state(tmp_path / "run")[1]["skipped"] == 2


@pytest.mark.parametrize("where", ["loss", "gradient", "weight"])
def test_too_many_steps_that_are_not_finite_stop_the_run_with_a_diagnosis(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    break_steps(monkeypatch, where, {4, 5, 6})
    what = "gradient" if where == "gradient" else "loss"
    cause = "1 parameters are not finite, first blocks1.0.conv1.weight"
    if where != "weight":
        cause = "pictures, parameters and outputs are finite"
    message = f"the {what} is not finite at step 5 of 6 .*2 steps in a row.*{cause}.*lower blr"
    with pytest.raises(TrainingError, match=message) as error:
        pretrain(options(pictures, tmp_path / "run", save_every=1, max_nonfinite=2))
    assert "the checkpoint before is intact" in str(error.value)
    left = tensors(tmp_path / "run")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in left.values())
    assert checkpoints.read_training_state(tmp_path / "run")[1]["step"] == 3
    (failed,) = [e for e in logs.read_log(tmp_path / "run") if e.get("event") == "failed"]
    assert failed["step"] == 5 and cause in failed["reason"]


def test_the_first_module_that_is_not_finite_is_named(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from convmae.models.layers import Block

    forward, calls = Block.forward, [0]

    def overflowing(block: Block, x: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
        calls[0] += 1
        return forward(block, x, *args, **more) * (math.inf if calls[0] % 3 == 0 else 1.0)

    monkeypatch.setattr(Block, "forward", overflowing)
    with pytest.raises(TrainingError, match="first output that is not finite is of .*blocks"):
        pretrain(options(pictures, tmp_path / "run", max_nonfinite=1))


def test_float16_finds_its_scale_and_trains(pictures: Path, tmp_path: Path) -> None:
    config = options(pictures, tmp_path / "run", amp="float16", epochs=3, save_every=1)
    summary = pretrain(config)
    state = checkpoints.read_training_state(tmp_path / "run")[1]
    assert summary.steps == 9 and state["scaler"]["scale"] <= 65536
    assert summary.skipped == sum(
        e.get("event") == "nonfinite" for e in logs.read_log(tmp_path / "run")
    )
    assert summary.skipped < 9 and math.isfinite(summary.last_loss)
    assert all(tensor.dtype == torch.float32 for tensor in tensors(tmp_path / "run").values())
