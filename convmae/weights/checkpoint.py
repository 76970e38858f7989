"""Checkpoints: safetensors weights and the training state, replaced as one, never half-written."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convmae.config import ReadOptions, WeightsError, WeightsWarning
from convmae.data import IMAGENET, IMAGENET_MEAN, Statistics
from convmae.data.classes import ClassNames, ClassNumbers
from convmae.files import CHECKPOINT, flush, replaced_folder, replacing
from convmae.models.adapt import POSITIONS, adapt_channels, adapt_network, fit_position
from convmae.models.cnn.names import is_timm_name
from convmae.models.task_names import split_task
from convmae.weights.configuration import (
    blank_model,
    check_config,
    check_tensors,
    check_training_state,
)
from convmae.weights.digest import (
    STATE_DIGEST,
    check_state,
    file_digest,
    is_marked,
    with_digest,
)
from convmae.weights.header import described, finite_numbers, read_metadata
from convmae.weights.safe_load import load_tensors
from convmae.weights.tensor_files import read_safetensors, save_safetensors, save_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor, nn

WEIGHTS = "model.safetensors"
STATE = "training_state.pt"
# In the metadata of a model.safetensors, as JSON; all but the first where they are known.
_DESCRIBED = ("config", "mean", "std", "classes", "reading")
PICTURES = ("mean", "std")


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
            `ClassNumbers` where the data that it learned from had numbers alone.
        reading: how its pictures were read; None if it does not say.
    """

    path: Path
    model: str
    config: dict[str, Any]
    state: dict[str, Tensor]
    pictures: Statistics | None = None
    classes: ClassNames | None = None
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

    def build_model(
        self,
        device: torch.device | str = "cpu",
        img_size: int | tuple[int, int] | None = None,
        in_chans: int | None = None,
        adapt_input: str = "auto",
    ) -> nn.Module:
        """The model with these weights, in evaluation mode.

        Args:
            device: where to put it.
            img_size: for pictures of another size: the position embedding is resampled.
            in_chans: for pictures of another number of channels: the first convolution is adapted,
                and the last layer of a decoder, which predicts pixels.
            adapt_input: how, as in `convmae.load_model`.

        Raises:
            WeightsError: the weights do not fit the model that the file names.
            ValueError: an argument cannot be.
        """
        model = blank_model(self.path, self.model, self.config, self.state)
        own = model.state_dict()
        check_tensors(self.path, own, self.state)
        if (img_size, in_chans) != (None, None):
            return self._adapted(model, img_size, in_chans, adapt_input).to(device).eval()
        # Copies, so that training the model leaves `state` as it was.
        values = {
            key: value.to(device, own[key].dtype, copy=True) for key, value in self.state.items()
        }
        model.load_state_dict(values, assign=True)
        return model.eval()

    def _adapted(
        self, model: Any, img_size: Any, in_chans: int | None, adapt_input: str
    ) -> nn.Module:
        """The model for other pictures than those of `model`, which needs no values."""
        from convmae.models import create_model

        if split_task(self.model)[0]:
            raise ValueError(
                f"img_size and in_chans are of classifiers and pretraining models, but {self.path} "
                f"is of {self.model}: it takes pictures of any size as it is, and its channels are "
                f"{model.in_chans}; training with --init fits a backbone to others"
            )
        given = {"img_size": img_size, "in_chans": in_chans}
        config = {key: tuple(v) if isinstance(v, list) else v for key, v in self.config.items()}
        config |= {key: value for key, value in given.items() if value is not None}
        other: Any = create_model(self.model, **config)
        state = dict(self.state)
        if is_timm_name(self.model):
            before = self.config.get("in_chans", 3)
            note = adapt_network(state, other.state_dict(), before, adapt_input)
        else:
            for name in POSITIONS:
                if name in state:
                    old, new, fixed = model.grid, other.grid, other.fixed_positions
                    state[name], _ = fit_position(state[name], old, new, fixed)
            note = adapt_channels(state, other.in_chans, adapt_input)
        if note:
            warnings.warn(f"{self.path}: {note}", WeightsWarning, stacklevel=4)
        other.load_state_dict(other.state_dict() | state)
        return other


def describe(model: str, config: dict[str, Any]) -> str:
    """`name (option=value, ...)`."""
    return f"{model} ({', '.join(f'{key}={value}' for key, value in sorted(config.items()))})"


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """`config` as JSON would give it back (tuples become lists), to compare and to store."""
    return json.loads(json.dumps(config))


def save_checkpoint(
    run: Path,
    model: Any,
    name: str,
    training_state: dict[str, Any],
    weights: dict[str, Tensor] | None = None,
    pictures: Statistics | None = None,
    classes: ClassNames | None = None,
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
        save_tensors(training_state, fresh / STATE)
        digest = file_digest(fresh / STATE)
        described = (pictures, classes, reading, digest)
        write_weights(fresh / WEIGHTS, name, model.config, state, *described)
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
    model: Any,
    name: str,
    weights: dict[str, Tensor] | None = None,
    pictures: Statistics | None = None,
    classes: ClassNames | None = None,
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


def write_weights(
    path: Path,
    name: str,
    config: dict[str, Any],
    state: Mapping[str, Tensor],
    pictures: Statistics | None = None,
    classes: ClassNames | None = None,
    reading: ReadOptions | None = None,
    state_digest: str | None = None,
) -> None:
    """Writes `path`, a `.safetensors` file that names its model; whole or not only by `replacing`.

    Args:
        path: the file.
        name: the model's name for `convmae.create_model`.
        config: its configuration.
        state: its state dict.
        pictures: what its pictures were normalised with.
        classes: names of the classes that it tells apart.
        state_digest: `file_digest` of the training state that will lie beside it.

    Raises:
        OSError: the disk refused.
    """
    metadata = {"format": "pt", "model": name, "config": json.dumps(config)}
    if pictures is not None:
        metadata |= {key: json.dumps(list(v)) for key, v in pictures._asdict().items()}
    if classes is not None:
        numbers = isinstance(classes, ClassNumbers)
        metadata["classes"] = json.dumps([int(n) for n in classes] if numbers else list(classes))
    if reading is not None:
        metadata["reading"] = json.dumps(reading.given())
    if state_digest is not None:
        metadata[STATE_DIGEST] = state_digest
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    metadata = with_digest(metadata, tensors)
    save_safetensors(tensors, path, metadata)


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
    other = "; `convmae convert` makes one of other files of weights" if given.is_file() else ""
    raise WeightsError(
        f"path {str(path)!r} {what}; expected a run's folder, a checkpoint folder or a "
        f"{WEIGHTS} file{other}"
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


def read_weights_file(file: Path, ignore_digest: bool = False) -> Weights:
    """`open_weights` of a file, whatever its name.

    Args:
        file: a safetensors file.
        ignore_digest: take a file that was changed since convmae wrote it, as it is.
    """
    metadata, state = read_safetensors(file, ignore_digest)
    if "model" not in metadata or "config" not in metadata:
        raise WeightsError(
            f"{file} does not name its model; expected a file that convmae pretrain "
            f"wrote, with 'model' and 'config' in its metadata, found {sorted(metadata) or 'none'}"
            "; `convmae convert` writes one from it"
        )
    try:
        values = {key: described(metadata, key) for key in _DESCRIBED if key in metadata}
        mean, std = (
            finite_numbers(key, values[key]) if key in values else None for key in PICTURES
        )
        classes = _read_classes(values["classes"]) if "classes" in values else None
        config = dict(values["config"])
        reading = ReadOptions.of(values["reading"]) if "reading" in values else None
        channels = {config.get("in_chans", 3), *(len(v) for v in (mean, std) if v is not None)}
        if len(channels) > 1 or (mean is None) != (std is None):
            raise ValueError("mean, deviation and in_chans are not of the same channels")
    except (ValueError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"the metadata of {file} are damaged: {error}; expected JSON of {', '.join(_DESCRIBED)}"
        ) from error
    check_config(file, metadata["model"], config)
    if not is_marked(metadata):
        warnings.warn(
            f"{file} has no digest, as an earlier version wrote it: changed bits would not be "
            "noticed; what convmae writes from now on has one",
            WeightsWarning,
            stacklevel=2,
        )
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


def _read_classes(values: Any) -> ClassNames:
    """Class names from JSON: text, or numbers where the data had no names.

    Raises:
        ValueError: they are no list of text or of the numbers from 0.
    """
    if isinstance(values, list) and all(isinstance(name, str) for name in values):
        return ClassNames(values)
    if isinstance(values, list) and values == list(range(len(values))):
        return ClassNumbers.of(len(values))
    raise ValueError("classes are no list of names")


def load_model(
    path: str | Path,
    device: torch.device | str = "cpu",
    img_size: int | tuple[int, int] | None = None,
    in_chans: int | None = None,
    adapt_input: str = "auto",
) -> nn.Module:
    """The model of a checkpoint, with its weights, in evaluation mode.

    `open_weights(path)` has besides what its pictures were normalised with, and `build_model`.

    Args:
        path: a run's folder, a checkpoint folder or a `.safetensors` file.
        device: where to put it.
        img_size: height and width of the pictures, one number for squares, where they are not of
            the size that the model was trained on; its position embedding is then resampled.
        in_chans: channels of the pictures, where they are not as many as it was trained on.
        adapt_input: how the first convolution then becomes one of `in_chans` channels: `"sum"`
            gives every channel the sum over its channels / `in_chans`, `"repeat"` repeats them,
            scaled as timm does, `"fresh"` draws new ones; `"auto"` is the sum for one channel, else
            repeated. A warning says what was done.

    Raises:
        WeightsError: no readable checkpoint, or its weights do not fit the model it names.
        ValueError: an argument cannot be.
    """
    return open_weights(path).build_model(device, img_size, in_chans, adapt_input)


def read_statistics(folder: Path) -> Statistics | None:
    """Mean and deviation that a checkpoint folder tells, without reading its tensors.

    Raises:
        WeightsError: the metadata are damaged.
    """
    metadata = read_metadata(folder / WEIGHTS)
    if not all(key in metadata for key in PICTURES):
        return None
    try:
        mean, std = (finite_numbers(key, described(metadata, key)) for key in PICTURES)
    except ValueError as error:
        raise WeightsError(f"the metadata of {folder / WEIGHTS} are damaged: {error}") from error
    return Statistics(mean, std)


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
    check_state(file, read_metadata(folder / WEIGHTS))
    state = load_tensors(file)
    if not isinstance(state, dict):
        raise WeightsError(f"{file} holds a {type(state).__name__}, expected a training state")
    check_training_state(file, state)
    return weights, state
