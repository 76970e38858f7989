"""Checkpoints: safetensors weights and the training state, replaced as one, never half-written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from convmae.training.config import OptionError

if TYPE_CHECKING:
    from torch import Tensor

    from convmae.models import ConvMAE, ConvViT

FOLDER = "checkpoint"
WEIGHTS = "model.safetensors"
STATE = "training_state.pt"


@dataclass
class Weights:
    """What a weights file holds: the model's name, its configuration and its state dict."""

    path: Path
    model: str
    config: dict[str, Any]
    state: dict[str, Tensor]

    def describe(self) -> str:
        """One line that tells this model from another."""
        return describe(self.model, self.config)


def describe(model: str, config: dict[str, Any]) -> str:
    """`name (option=value, ...)`."""
    return f"{model} ({', '.join(f'{key}={value}' for key, value in sorted(config.items()))})"


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """`config` as JSON would give it back (tuples become lists), to compare and to store."""
    return json.loads(json.dumps(config))


def save_checkpoint(
    run: Path, model: ConvMAE | ConvViT, name: str, training_state: dict[str, Any]
) -> Path:
    """Writes `run/checkpoint/`, so that a crash at any moment leaves a whole checkpoint behind.

    Both files are written and flushed to disk in a folder beside it; then the old folder is renamed
    away, the new one takes its name, and the old one is deleted. `find_checkpoint` knows the name
    that the old one has between the two renames.

    Args:
        run: the run's folder; it must exist.
        model: its `state_dict()` and `config` go into `model.safetensors`.
        name: the model's name for `convmae.create_model`.
        training_state: tensors and plain values, for `training_state.pt`.

    Raises:
        OSError: the disk refused; the previous checkpoint is still there.
    """
    from safetensors.torch import save_file

    final, fresh, old = run / FOLDER, run / f".{FOLDER}.new", run / f".{FOLDER}.old"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    metadata = {"format": "pt", "model": name, "config": json.dumps(model.config)}
    state = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
    save_file(state, fresh / WEIGHTS, metadata=metadata)
    torch.save(training_state, fresh / STATE)
    shutil.copymode(fresh / STATE, fresh / WEIGHTS)  # safetensors lets nobody else read its files
    for path in (fresh / WEIGHTS, fresh / STATE, fresh):
        _flush(path)
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
    try:
        os.replace(fresh, final)
    except OSError:
        if old.exists():
            os.replace(old, final)
        raise
    _flush(run)
    shutil.rmtree(old, ignore_errors=True)
    return final


def _flush(path: Path) -> None:
    """`fsync`, of a folder too where the system can open one."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def find_checkpoint(path: str | Path, option: str) -> Path:
    """The folder that holds the weights: `path`, `path/checkpoint`, or the one being replaced.

    Args:
        path: a run's folder, a checkpoint folder, or one of its files.
        option: the flag to name in the error.

    Raises:
        OptionError: there is no checkpoint.
    """
    given = Path(path).expanduser()
    folder = given.parent if given.is_file() else given
    replaced = folder.parent / f".{FOLDER}.old" if folder.name == FOLDER else folder
    for candidate in (folder, folder / FOLDER, folder / f".{FOLDER}.old", replaced):
        if (candidate / WEIGHTS).is_file():
            return candidate
    what = "holds no checkpoint" if given.exists() else "does not exist"
    raise OptionError(
        f"{option} {str(path)!r} {what}; expected a run's folder, a checkpoint folder or a "
        f"{WEIGHTS} file"
    )


def read_weights(path: str | Path, option: str) -> Weights:
    """The weights of a checkpoint, on the CPU.

    Raises:
        OptionError: there are none, the file is damaged, or it does not say which model it is.
    """
    from safetensors import SafetensorError, safe_open

    given = Path(path).expanduser()
    is_weights = given.is_file() and given.suffix == ".safetensors"
    file = given if is_weights else find_checkpoint(path, option) / WEIGHTS
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise OptionError(f"{option}: {file} is not readable as safetensors: {error}") from error
    if "model" not in metadata or "config" not in metadata:
        raise OptionError(
            f"{option}: {file} does not name its model; expected a file that convmae pretrain "
            f"wrote, with 'model' and 'config' in its metadata, found {sorted(metadata) or 'none'}"
        )
    return Weights(file, metadata["model"], json.loads(metadata["config"]), state)


def load_model(path: str | Path, device: torch.device | str = "cpu") -> ConvMAE | ConvViT:
    """The model of a checkpoint, with its weights, in evaluation mode.

    Args:
        path: a run's folder, a checkpoint folder or a `.safetensors` file.
        device: where to put it.

    Raises:
        OptionError: no readable checkpoint, or its weights do not fit the model it names.
    """
    import convmae

    weights = read_weights(path, "--checkpoint")
    config = {key: tuple(v) if isinstance(v, list) else v for key, v in weights.config.items()}
    try:
        model = convmae.create_model(weights.model, **config)
        model.load_state_dict(weights.state)
    except (ValueError, TypeError, RuntimeError) as error:
        raise OptionError(
            f"--checkpoint: {weights.path} does not fit the model it names, "
            f"{weights.describe()}: {error}"
        ) from error
    return model.to(device).eval()


def read_training_state(path: str | Path) -> tuple[Weights, dict[str, Any]]:
    """Weights and training state of a checkpoint to go on from, on the CPU.

    Raises:
        OptionError: there is none, or a file of it is missing or damaged.
    """
    folder = find_checkpoint(path, "--resume")
    file = folder / STATE
    if not file.is_file():
        raise OptionError(
            f"--resume: {folder} holds weights only; going on with a run also needs its {STATE}"
        )
    weights = read_weights(folder, "--resume")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise OptionError(f"--resume: {file} is damaged: {error}") from error
    return weights, state
