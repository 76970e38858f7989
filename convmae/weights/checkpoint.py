"""Checkpoints: safetensors weights and the training state, replaced as one, never half-written."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from convmae.config import OptionError
from convmae.data import IMAGENET_MEAN, IMAGENET_STD
from convmae.files import flush, replacing
from convmae.weights.safe_load import load_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from convmae.models import ConvMAE, ConvViT

FOLDER = "checkpoint"
WEIGHTS = "model.safetensors"
STATE = "training_state.pt"
_DESCRIBED = ("config", "mean", "std")  # in the metadata of a model.safetensors, as JSON


@dataclass
class Weights:
    """What a weights file holds: the model's name, its configuration and its state dict.

    `mean` and `std` are those of the pictures it was trained on, a number a channel; None if the
    file does not tell.
    """

    path: Path
    model: str
    config: dict[str, Any]
    state: dict[str, Tensor]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def describe(self) -> str:
        """One line that tells this model from another."""
        return describe(self.model, self.config)

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation to normalise with: those it tells, else ImageNet's.

        Raises:
            OptionError: it tells none, and is of another number of channels than 3.
        """
        if self.mean is not None and self.std is not None:
            return self.mean, self.std
        channels = self.config.get("in_chans", len(IMAGENET_MEAN))
        if channels != len(IMAGENET_MEAN):
            raise OptionError(
                f"{self.path} is of {channels} channels and does not tell the mean and deviation "
                "that its pictures were normalised with"
            )
        return IMAGENET_MEAN, IMAGENET_STD


def describe(model: str, config: dict[str, Any]) -> str:
    """`name (option=value, ...)`."""
    return f"{model} ({', '.join(f'{key}={value}' for key, value in sorted(config.items()))})"


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """`config` as JSON would give it back (tuples become lists), to compare and to store."""
    return json.loads(json.dumps(config))


def save_checkpoint(
    run: Path,
    model: ConvMAE | ConvViT,
    name: str,
    training_state: dict[str, Any],
    weights: dict[str, Tensor] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Path:
    """Writes `run/checkpoint/`, so that a crash at any moment leaves a whole checkpoint behind.

    Both files are written and flushed to disk in a folder beside it; then the old folder is renamed
    away, the new one takes its name, and the old one is deleted. `find_checkpoint` knows the name
    that the old one has between the two renames.

    Args:
        run: the run's folder; it must exist.
        model: its `config` goes into `model.safetensors`.
        name: the model's name for `convmae.create_model`.
        training_state: tensors and plain values, for `training_state.pt`.
        weights: the state dict, if the model's own is spread over processes.
        mean, std: what its pictures were normalised with.

    Raises:
        OSError: the disk refused; the previous checkpoint is still there.
    """
    final, fresh, old = run / FOLDER, run / f".{FOLDER}.new", run / f".{FOLDER}.old"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        state = model.state_dict() if weights is None else weights
        write_weights(fresh / WEIGHTS, name, model.config, state, mean, std)
        save_tensors(training_state, fresh / STATE)
        for path in (fresh / WEIGHTS, fresh / STATE, fresh):
            flush(path)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)  # a full disk needs the space
        raise
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
    try:
        os.replace(fresh, final)
    except OSError:
        if old.exists():
            os.replace(old, final)
        raise
    flush(run)
    shutil.rmtree(old, ignore_errors=True)
    return final


def save_weights(
    folder: Path,
    model: ConvMAE | ConvViT,
    name: str,
    weights: dict[str, Tensor] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Path:
    """Writes `folder/model.safetensors`, in place of the old one, whole or not at all.

    Arguments and errors are those of `save_checkpoint`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict() if weights is None else weights
    with replacing(folder / WEIGHTS) as fresh:
        write_weights(fresh, name, model.config, state, mean, std)
    return folder / WEIGHTS


def save_tensors(value: Any, path: Path) -> None:
    """`torch.save`, with an `OSError` where the disk refuses."""
    try:
        torch.save(value, path)
    except RuntimeError as error:  # what PyTorch's writer raises on a full disk
        raise _refused(path, error) from error


def _refused(path: Path, error: Exception) -> OSError:
    """The `OSError` that a writer of `path` should have raised."""
    free = shutil.disk_usage(path.parent).free
    return OSError(
        f"{path} could not be written: {error} (the disk has {free / 2**20:.0f} MiB left)"
    )


def write_weights(
    path: Path,
    name: str,
    config: dict[str, Any],
    state: Mapping[str, Tensor],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> None:
    """Writes `path`, a `.safetensors` file that names its model; whole or not only by `replacing`.

    Raises:
        OSError: the disk refused.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    metadata = {"format": "pt", "model": name, "config": json.dumps(config)}
    if mean is not None and std is not None:
        metadata |= {"mean": json.dumps(list(mean)), "std": json.dumps(list(std))}
    tensors = {key: value.detach().contiguous() for key, value in state.items()}
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:  # a full disk, too
        raise _refused(path, error) from error
    path.chmod(mode)  # safetensors lets nobody else read its files


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
    given = Path(path).expanduser()
    is_weights = given.is_file() and given.suffix == ".safetensors"
    return read_weights_file(
        given if is_weights else find_checkpoint(path, option) / WEIGHTS, option
    )


def read_weights_file(file: Path, option: str) -> Weights:
    """`read_weights` of a file, whatever its name."""
    from safetensors import SafetensorError, safe_open

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
    try:
        values = {key: json.loads(metadata[key]) for key in _DESCRIBED if key in metadata}
        mean, std = (tuple(map(float, values[k])) if k in values else None for k in ("mean", "std"))
        config = dict(values["config"])
    except (ValueError, TypeError) as error:
        raise OptionError(
            f"{option}: the metadata of {file} are damaged: {error}; expected JSON of "
            f"{', '.join(_DESCRIBED)}"
        ) from error
    return Weights(file, metadata["model"], config, state, mean, std)


def load_model(path: str | Path, device: torch.device | str = "cpu") -> ConvMAE | ConvViT:
    """The model of a checkpoint, with its weights, in evaluation mode.

    Args:
        path: a run's folder, a checkpoint folder or a `.safetensors` file.
        device: where to put it.

    Raises:
        OptionError: no readable checkpoint, or its weights do not fit the model it names.
    """
    from convmae.models import create_model

    weights = read_weights(path, "--checkpoint")
    config = {key: tuple(v) if isinstance(v, list) else v for key, v in weights.config.items()}
    try:
        model = create_model(weights.model, **config)
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
    state = load_tensors(file, "--resume")
    if not isinstance(state, dict):
        raise OptionError(
            f"--resume: {file} holds a {type(state).__name__}, expected a training state"
        )
    return weights, state
