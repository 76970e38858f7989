"""What a file says of its model, against what its tensors say: before a model is built."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from convmae.config import WeightsError
from convmae.models.cnn.names import METHODS, is_timm_name, timm_name
from convmae.models.registry import MODELS, create_model, full_name, list_models
from convmae.models.task_names import split_task

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

LARGEST = 1 << 31  # of any number in a configuration
_WHOLE = (
    *("in_chans", "num_classes", "num_heads"),
    *("decoder_embed_dim", "decoder_depth", "decoder_num_heads"),
)
_THREE_WHOLE = ("embed_dim", "depth")
_YES_OR_NO = ("norm_pix_loss", "head_norm", "dynamic_img_size")


def check_config(path: Path, model: Any, config: Mapping[str, Any]) -> None:
    """Every value of a configuration is of the kind that `model` takes, and a number is a number.

    Args:
        path: the file that says it.
        model: the name of the model.
        config: as the file has it.

    Raises:
        WeightsError: there is no such model or argument, or a value is of another kind.
    """
    name = full_name(str(model))
    if is_timm_name(name):
        _check_network(path, name, config)
        return
    if split_task(name)[0]:
        _check_dense(path, name, config)
        return
    if name not in MODELS:
        close = difflib.get_close_matches(str(model), list_models())
        hint = f"did it mean {' or '.join(close)}?" if close else "a newer version may know it"
        raise WeightsError(f"{path} is of model {_short(model)}, which there is not; {hint}")
    known = list(inspect.signature(MODELS[name][0]).parameters)
    for key, value in config.items():
        if key not in known:
            raise WeightsError(
                f"{path} has {_short(key)} in the configuration of its model; {name} takes "
                f"{', '.join(known)}"
            )
        wanted = _unfit(key, value)
        if wanted:
            raise WeightsError(
                f"the configuration in {path} has {key} {_short(value)}, expected {wanted}"
            )


def _check_network(path: Path, name: str, config: Mapping[str, Any]) -> None:
    """The same of one of timm's networks, a classifier's or a pretraining model's configuration.

    Which arguments its method takes is seen where the model is built.
    """
    try:
        timm_name(name)  # nor is it an address, which timm would read from
    except ValueError as error:
        raise WeightsError(f"{path} is of model {_short(name)}: {error}") from error
    for key, value in config.items():
        wanted = _unfit_of_network(key, value)
        if wanted:
            raise WeightsError(
                f"the configuration in {path} has {_short(key)} {_short(value)}, expected {wanted}"
            )


def _check_dense(path: Path, name: str, config: Mapping[str, Any]) -> None:
    """The same of a segmenter or a detector.

    Which arguments it takes is seen where the model is built.
    """
    task, bare = split_task(name)
    if is_timm_name(bare):
        try:
            timm_name(bare)
        except ValueError as error:
            raise WeightsError(f"{path} is of model {_short(name)}: {error}") from error
    elif name not in list_models(f"{task}*"):
        known = ", ".join(list_models(f"{task}*"))
        raise WeightsError(
            f"{path} is of model {_short(name)}, which there is not; expected one of {known}"
        )
    for key, value in config.items():
        if key in ("img_size", "in_chans", "num_classes", "drop_path_rate"):
            wanted = _unfit(key, value)
        else:
            many = value if isinstance(value, list | tuple) else [value]
            plain = all(v is None or isinstance(v, bool | str) or _is_number(v) for v in many)
            wanted = None if plain else "true, false, a text or finite numbers"
        if wanted:
            raise WeightsError(
                f"the configuration in {path} has {_short(key)} {_short(value)}, expected {wanted}"
            )


def _unfit_of_network(key: str, value: Any) -> str | None:
    """What was expected instead of `value` for one of timm's networks; None if it can be."""
    if key == "method":
        return None if value in (None, *METHODS) else " or ".join(METHODS)
    if key in ("img_size", "in_chans", "num_classes", "drop_path_rate", *_YES_OR_NO):
        return _unfit(key, value)
    many = value if isinstance(value, list | tuple) else [value]
    plain = all(v is None or isinstance(v, bool | str) or _is_number(v) for v in many)
    return None if plain and len(many) <= 16 else "true, false, a text or finite numbers"


def _unfit(key: str, value: Any) -> str | None:
    """What was expected instead of `value`; None if it can be."""
    if key in _WHOLE:
        return None if _is_whole(value) else f"a whole number below {LARGEST}"
    if key == "img_size":
        pair = value if isinstance(value, list | tuple) else (value, value)
        fits = len(pair) == 2 and all(map(_is_whole, pair))
        return None if fits else f"one or two whole numbers below {LARGEST}"
    if key in _THREE_WHOLE:
        fits = isinstance(value, list | tuple) and len(value) == 3 and all(map(_is_whole, value))
        return None if fits else f"three whole numbers below {LARGEST}"
    if key == "mlp_ratio":
        fits = isinstance(value, list | tuple) and len(value) == 3 and all(map(_is_number, value))
        return None if fits else "three finite numbers"
    if key == "drop_path_rate":
        return None if _is_number(value) else "a finite number"
    if key in _YES_OR_NO:
        return None if isinstance(value, bool) else "true or false"
    return None if isinstance(value, bool | str) else "true, false or a text"  # global_pool


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST


def _is_positive(value: object) -> bool:
    return _is_whole(value) and value != 0


def _are_numbers(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


def _is_number(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return math.isfinite(value) and abs(value) < LARGEST


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def check_training_state(path: Path, state: Mapping[str, Any]) -> None:
    """What a training state holds is of the kind that a run writes, as far as it is there.

    Raises:
        WeightsError: naming the first entry that is not.
    """
    wanted = {
        "step": (_is_whole, "a whole number"),
        "steps_per_epoch": (_is_positive, "a positive whole number"),
        "nonfinite": (_is_whole, "a whole number"),
        "skipped": (_is_whole, "a whole number"),
        "losses": (_are_numbers, "a list of finite numbers"),
        "optimizer": (_is_dictionary, "a dictionary"),
        "options": (_is_dictionary, "a dictionary"),
        "task": (_is_dictionary, "a dictionary"),
    }
    for key, (fits, words) in wanted.items():
        if key in state and not fits(state[key]):
            raise WeightsError(f"{path} has {key} {_short(state[key])}, expected {words}")
    waiting: list[tuple[str, Any]] = [("", state)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, torch.Tensor):
            if has_part_only(value):
                raise WeightsError(
                    f"{path}: {name} is a tensor of shape {list(value.shape)} with values for a "
                    "part of it only"
                )
        elif isinstance(value, Mapping):
            waiting += [(f"{name}.{key}".lstrip("."), item) for key, item in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(f"{name}[{number}]", item) for number, item in enumerate(value)]


def has_part_only(value: Tensor) -> bool:
    """Whether a tensor has fewer values than its shape says, as one of stride 0 has."""
    return value.numel() * value.element_size() > value.untyped_storage().nbytes()


def _is_dictionary(value: object) -> bool:
    return isinstance(value, dict)


def count_blocks(path: Path, names: Mapping[str, Any], prefix: str) -> int:
    """How many blocks have a tensor, whose names have the numbers 0, 1, ... behind `prefix`.

    Raises:
        WeightsError: a number is left out.
    """
    texts = {name[len(prefix) :].partition(".")[0] for name in names if name.startswith(prefix)}
    numbers = {text for text in texts if text.isdecimal()}
    absent = [n for n in range(len(numbers)) if str(n) not in numbers]
    if absent:
        raise WeightsError(
            f"{path} has tensors of {len(numbers)} modules {prefix}*, but none of {prefix}"
            f"{absent[0]}; it has {prefix}{_short(max(numbers, key=len))}"
        )
    return len(numbers)


def blank_model(
    path: Path, model: str, config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> Any:
    """The model that a file names, without values; it has as many blocks as the file.

    Nothing is allocated, however large the numbers are.

    Raises:
        WeightsError: the configuration does not fit the tensors, or is none of a model.
    """
    name = full_name(model)
    _check_blocks(path, name, config, state)
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in config.items()}
    try:
        with torch.device("meta"):
            return create_model(name, **values)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        words = str(error).strip().splitlines()
        raise WeightsError(
            f"{path} does not fit the model it names, {_short(name)}: {words[0] if words else ''}"
        ) from error


def _check_blocks(
    path: Path, name: str, config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> None:
    """As many blocks are said as there are: so many are built, which takes time for each.

    Raises:
        WeightsError: there are not.
    """
    if split_task(name)[0]:
        _check_layers(path, config, state)
        return
    depths = {"depth": ("blocks1.", "blocks2.", "blocks3."), "decoder_depth": ("decoder_blocks.",)}
    given = dict(config)
    if not is_timm_name(name):
        given = MODELS[name][1] | given
    elif config.get("method") == "fcmae":  # the depth of a network is that of its name
        depths = {"decoder_depth": ("decoder.",)}
    else:
        depths = {}
    for key, prefixes in depths.items():
        found = [count_blocks(path, state, prefix) for prefix in prefixes]
        said = given.get(key, found)
        if (list(said) if isinstance(said, list | tuple) else [said]) != found:
            raise WeightsError(
                f"{path} does not fit the model it names: its configuration has {key} {said}, but "
                f"its tensors are of {found[0] if len(found) == 1 else found} blocks"
            )


def _check_layers(path: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """No number of layers of a segmenter or detector is above the number of its tensors.

    Raises:
        WeightsError: one is.
    """
    for key in ("depth", "rpn_convs", "box_convs", "mask_convs"):
        value = config.get(key, 0)
        total = sum(value) if isinstance(value, list | tuple) else value
        if total is not None and total > len(state):
            raise WeightsError(
                f"{path} does not fit the model it names: its configuration has {key} "
                f"{_short(value)}, but there are {len(state)} tensors"
            )


def check_tensors(path: Path, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """A state dict has the names and shapes of a model's own.

    Raises:
        WeightsError: naming the first that differs.
    """
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    if missing or unexpected:
        what = f"lacks {missing[0]}" if missing else f"has {unexpected[0]} besides"
        more = len(missing) + len(unexpected) - 1
        raise WeightsError(
            f"{path} does not fit the model it names: it {what}"
            + (f", and {more} more tensors differ" if more else "")
        )
    for name, value in own.items():
        if value.shape != state[name].shape:
            raise WeightsError(
                f"{path} does not fit the model it names: {name} has shape "
                f"{list(state[name].shape)}, but the model of its configuration has "
                f"{list(value.shape)}"
            )
