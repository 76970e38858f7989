"""Checkpoints: safetensors weights and the training state, replaced as one, never half-written."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from convmae.config import ReadOptions, WeightsError
from convmae.data import IMAGENET, IMAGENET_MEAN, Statistics
from convmae.files import CHECKPOINT, flush, replaced_folder, replacing
from convmae.weights.safe_load import load_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from convmae.models import ConvMAE, ConvViT

WEIGHTS = "model.safetensors"
STATE = "training_state.pt"
# In the metadata of a model.safetensors, as JSON; all but the first where they are known.
_DESCRIBED = ("config", "mean", "std", "classes", "reading")


@dataclass
class Weights:
    """What a weights file holds: the model's name, its configuration and its state dict.

    Attributes:
        path: the file.
        model: the name for `convmae.create_model`.
        config: the model's configuration.
        state: the state dict, on the CPU.
        pictures: mean and deviation of the pictures it was trained on; None if it does not say.
        classes: names of the classes that it tells apart, in their order; None if it does not say.
        reading: how its pictures were read; None if it does not say.
    """

    path: Path
    model: str
    config: dict[str, Any]
    state: dict[str, Tensor]
    pictures: Statistics | None = None
    classes: tuple[str, ...] | None = None
    reading: ReadOptions | None = None

    def describe(self) -> str:
        """One line that tells this model from another."""
        return describe(self.model, self.config)

    @property
    def statistics(self) -> Statistics:
        """Mean and deviation to normalise with: those it says, else ImageNet's.

        Raises:
            WeightsError: it tells none, and is of another number of channels than 3.
        """
        if self.pictures is not None:
            return self.pictures
        channels = self.config.get("in_chans", len(IMAGENET_MEAN))
        if channels != len(IMAGENET_MEAN):
            raise WeightsError(
                f"{self.path} is of {channels} channels and does not tell the mean and deviation "
                "that its pictures were normalised with"
            )
        return IMAGENET

    def build_model(self, device: torch.device | str = "cpu") -> ConvMAE | ConvViT:
        """The model with these weights, in evaluation mode.

        Raises:
            WeightsError: the weights do not fit the model that the file names.
        """
        from convmae.models import create_model

        config = {key: tuple(v) if isinstance(v, list) else v for key, v in self.config.items()}
        try:
            model = create_model(self.model, **config)
            model.load_state_dict(self.state)
        except (ValueError, TypeError, RuntimeError) as error:
            raise WeightsError(
                f"{self.path} does not fit the model it names, {self.describe()}: {error}"
            ) from error
        return model.to(device).eval()


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
    pictures: Statistics | None = None,
    classes: Sequence[str] | None = None,
    reading: ReadOptions | None = None,
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
        pictures: what its pictures were normalised with.
        classes: names of the classes that it tells apart.
        reading: how its pictures were read.

    Raises:
        OSError: the disk refused; the previous checkpoint is still there.
    """
    final, fresh = run / CHECKPOINT, run / f".{CHECKPOINT}.new"
    old = replaced_folder(final)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        state = model.state_dict() if weights is None else weights
        write_weights(fresh / WEIGHTS, name, model.config, state, pictures, classes, reading)
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
    pictures: Statistics | None = None,
    classes: Sequence[str] | None = None,
    reading: ReadOptions | None = None,
) -> Path:
    """Writes `folder/model.safetensors`, in place of the old one, whole or not at all.

    Arguments and errors are those of `save_checkpoint`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict() if weights is None else weights
    with replacing(folder / WEIGHTS) as fresh:
        write_weights(fresh, name, model.config, state, pictures, classes, reading)
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
    pictures: Statistics | None = None,
    classes: Sequence[str] | None = None,
    reading: ReadOptions | None = None,
) -> None:
    """Writes `path`, a `.safetensors` file that names its model; whole or not only by `replacing`.

    Raises:
        OSError: the disk refused.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    metadata = {"format": "pt", "model": name, "config": json.dumps(config)}
    if pictures is not None:
        metadata |= {key: json.dumps(list(v)) for key, v in pictures._asdict().items()}
    if classes is not None:
        metadata["classes"] = json.dumps(list(classes))
    if reading is not None:
        metadata["reading"] = json.dumps(reading.given())
    tensors = {key: value.detach().contiguous() for key, value in state.items()}
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:  # a full disk, too
        raise _refused(path, error) from error
    path.chmod(mode)  # safetensors lets nobody else read its files


def find_checkpoint(path: str | Path) -> Path:
    """The folder that holds the weights: `path`, `path/checkpoint`, or the one being replaced.

    Args:
        path: a run's folder, a checkpoint folder, or one of its files.

    Raises:
        WeightsError: there is no checkpoint.
    """
    given = Path(path).expanduser()
    folder = given.parent if given.is_file() else given
    inside = folder / CHECKPOINT
    replaced = replaced_folder(folder) if folder.name == CHECKPOINT else folder
    for candidate in (folder, inside, replaced_folder(inside), replaced):
        if (candidate / WEIGHTS).is_file():
            return candidate
    what = "holds no checkpoint" if given.exists() else "does not exist"
    raise WeightsError(
        f"path {str(path)!r} {what}; expected a run's folder, a checkpoint folder or a "
        f"{WEIGHTS} file"
    )


def open_weights(path: str | Path) -> Weights:
    """The weights of a checkpoint, on the CPU, with all that the file says about them.

    Args:
        path: a run's folder, a checkpoint folder or a `.safetensors` file that convmae wrote.

    Raises:
        WeightsError: there are none, the file is damaged, or it does not say which model it is.
    """
    given = Path(path).expanduser()
    is_weights = given.is_file() and given.suffix == ".safetensors"
    return read_weights_file(given if is_weights else find_checkpoint(path) / WEIGHTS)


def read_weights_file(file: Path) -> Weights:
    """`open_weights` of a file, whatever its name."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file} is not readable as safetensors: {error}") from error
    if "model" not in metadata or "config" not in metadata:
        raise WeightsError(
            f"{file} does not name its model; expected a file that convmae pretrain "
            f"wrote, with 'model' and 'config' in its metadata, found {sorted(metadata) or 'none'}"
        )
    try:
        values = {key: json.loads(metadata[key]) for key in _DESCRIBED if key in metadata}
        mean, std = (tuple(map(float, values[k])) if k in values else None for k in ("mean", "std"))
        classes = tuple(map(str, values["classes"])) if "classes" in values else None
        config = dict(values["config"])
        reading = ReadOptions.of(values["reading"]) if "reading" in values else None
    except (ValueError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"the metadata of {file} are damaged: {error}; expected JSON of {', '.join(_DESCRIBED)}"
        ) from error
    pictures = None if mean is None or std is None else Statistics(mean, std)
    return Weights(file, metadata["model"], config, state, pictures, classes, reading)


def stored_reading(path: str | Path) -> ReadOptions | None:
    """How the pictures of a checkpoint were read, without its tensors; None if it does not say.

    Args:
        path: a run's folder, a checkpoint folder or a file; what convmae has not written says
            nothing.
    """
    from safetensors import SafetensorError, safe_open

    given = Path(path).expanduser()
    try:
        is_weights = given.is_file() and given.suffix == ".safetensors"
        file = given if is_weights else find_checkpoint(given) / WEIGHTS
        with safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get("reading")
        return None if text is None else ReadOptions.of(json.loads(text))
    except (WeightsError, SafetensorError, OSError, ValueError, TypeError, AttributeError):
        return None  # whoever needs the weights tells what is wrong with them


def load_model(path: str | Path, device: torch.device | str = "cpu") -> ConvMAE | ConvViT:
    """The model of a checkpoint, with its weights, in evaluation mode.

    `open_weights(path)` has besides what its pictures were normalised with, and `build_model`.

    Args:
        path: a run's folder, a checkpoint folder or a `.safetensors` file.
        device: where to put it.

    Raises:
        WeightsError: no readable checkpoint, or its weights do not fit the model it names.
    """
    return open_weights(path).build_model(device)


def read_training_state(path: str | Path) -> tuple[Weights, dict[str, Any]]:
    """Weights and training state of a checkpoint to go on from, on the CPU.

    Raises:
        WeightsError: there is none, or a file of it is missing or damaged.
    """
    folder = find_checkpoint(path)
    file = folder / STATE
    if not file.is_file():
        raise WeightsError(
            f"{folder} holds weights only; going on with a run also needs its {STATE}"
        )
    weights = open_weights(folder)
    state = load_tensors(file)
    if not isinstance(state, dict):
        raise WeightsError(f"{file} holds a {type(state).__name__}, expected a training state")
    return weights, state
