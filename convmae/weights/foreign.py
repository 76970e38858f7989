"""Weights of any origin: finds the tensors in a file, and what else it tells about them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from convmae.config import WeightsError
from convmae.models.adapt import DECODER
from convmae.models.dense_tasks.backbone import INDEX_BUFFER
from convmae.weights.checkpoint import (
    WEIGHTS,
    Weights,
    find_checkpoint,
    read_weights_file,
)
from convmae.weights.cnn_names import SPARK_CONFIG, UNUSED, network_tensors
from convmae.weights.configuration import has_part_only
from convmae.weights.header import read_metadata
from convmae.weights.safe_load import PICKLE, ZIP, load_tensors
from convmae.weights.tensor_files import read_safetensors

if TYPE_CHECKING:
    from collections.abc import Iterable

# The first of them is read; "module" is SparK's.
ENTRIES = ("model", "state_dict", "model_ema", "state_dict_ema", "module")
# Of DistributedDataParallel, of torch.compile, of Lightning and timm's features_only.
WRAPPERS = ("module.", "_orig_mod.", "model.")
# What the names of a model's tensors begin with.
ENCODER = ("pos_embed", "patch_embed", "blocks1.", "blocks2.", "blocks3.")
HEAD = ("norm.", "fc_norm.", "head.")


@dataclass
class ForeignWeights:
    """Tensors of a file by their official names; of a convolutional network by timm's.

    Attributes:
        path: the file.
        what: in words, what was read.
        state: floating tensors, as they are in the file.
        unexpected: names of what is no tensor of a model of ours.
        ours: name, configuration and statistics, if convmae wrote it.
        options: the options of the run, if the official code wrote it.
        notes: what was done to the tensors on reading.
    """

    path: Path
    what: str
    state: dict[str, Tensor]
    unexpected: list[str] = field(default_factory=list)
    ours: Weights | None = None
    options: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def open_foreign(
    path: str | Path, key: str | None = None, ignore_digest: bool = False
) -> ForeignWeights:
    """The weights of a run's folder, of a `.safetensors` file or of a PyTorch file.

    Which of them a file is, its first bytes tell, not its name.

    Args:
        path: the file or folder.
        key: the entry of a PyTorch file that holds the weights; found by itself if None.
        ignore_digest: take a file that was changed since convmae wrote it, as it is.

    Raises:
        WeightsError: there is no such file, it is damaged or no file of weights, or it asks for
            code to be run.
    """
    given = Path(path).expanduser()
    if not given.exists() and given.suffix:
        raise WeightsError(f"path {str(path)!r} does not exist")
    kind = _kind_of(given) if given.is_file() else "folder"
    if kind == "pytorch":
        found = _read_pytorch(given, key)
    elif key is not None:
        raise WeightsError(f"--key {key!r}: {given} is a {kind}, which has no entries")
    elif kind == "folder":
        file = find_checkpoint(path) / WEIGHTS
        found = _read_safetensors(file, ignore_digest)
    else:
        found = _read_safetensors(given, ignore_digest)
    _drop_class_token(found)
    return found


def _ours(weights: Weights) -> ForeignWeights:
    what = f"weights of convmae: {weights.model}"
    known, unexpected = _sort_out(weights.state, weights.path)
    return ForeignWeights(weights.path, what, known, unexpected, weights)


def _kind_of(path: Path) -> str:
    """`safetensors file` or `pytorch`, from the first bytes."""
    try:
        with path.open("rb") as opened:
            head = opened.read(64)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    if not head:
        raise WeightsError(f"{path} is empty (0 bytes)")
    # Its header's length comes first: any 8 bytes, which may look like the begin of other files.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40:
        return "safetensors file"
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError(
            f"{path} is a pointer of Git LFS, not the weights; `git lfs pull` gets them"
        )
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        begin = head.decode("utf-8", "replace").strip().splitlines()[0][:32]
        raise WeightsError(
            f"{path} is a web page (it begins with {begin!r}), not weights; the download "
            "brought a page, such as a login or a confirmation, in place of the file"
        )
    if head.startswith((ZIP, PICKLE)):
        return "pytorch"
    raise WeightsError(
        f"{path} is neither a PyTorch file nor safetensors; it begins with {head[:12]!r}"
    )


def _read_safetensors(path: Path, ignore_digest: bool) -> ForeignWeights:
    metadata = read_metadata(path)
    if "model" in metadata and "config" in metadata:
        return _ours(read_weights_file(path, ignore_digest))
    _, state = read_safetensors(path, ignore_digest)
    known, unexpected = _sort_out(state, path)
    return ForeignWeights(path, f"safetensors, {len(state)} tensors", known, unexpected)


def _read_pytorch(path: Path, key: str | None) -> ForeignWeights:
    # argparse.Namespace, which official files hold, only has attributes set: plain data.
    data = load_tensors(path, allow=[argparse.Namespace])
    if not isinstance(data, Mapping):
        raise WeightsError(
            f"{path} holds a {type(data).__name__}, expected a dictionary of tensors"
        )
    entry = _entry(data, path, key)
    state = data if entry is None else data[entry]
    known, unexpected = _sort_out(state, path)
    others = [] if entry is None else [str(name) for name in data if name != entry]
    what = f"PyTorch file, {'tensors' if entry is None else repr(entry)}"
    if others:
        what += f" (not read: {few(others)})"
    args = data.get("args")
    options = dict(vars(args)) if isinstance(args, argparse.Namespace) else {}
    options |= _spark_options(data, state) | _segmenter_options(data)
    return ForeignWeights(path, what, known, unexpected, None, options)


def _spark_options(data: Mapping[Any, Any], state: Mapping[Any, Any]) -> dict[str, Any]:
    """What SparK's code writes beside the tensors, as far as it is plain text or numbers."""
    found = {key: data[key] for key in ("arch", "input_size") if key in data}
    described = state.get(SPARK_CONFIG)
    if isinstance(described, Mapping):
        found |= {key: described[key] for key in ("mask_ratio",) if key in described}
    plain = {key: value for key, value in found.items() if isinstance(value, str | int | float)}
    return plain


def _segmenter_options(data: Mapping[Any, Any]) -> dict[str, Any]:
    """The names of the classes that the code of the official segmenter writes beside tensors."""
    meta = data.get("meta")
    names = meta.get("CLASSES") if isinstance(meta, Mapping) else None
    if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
        return {}
    return {"classes": tuple(names)}


def _entry(data: Mapping[Any, Any], path: Path, key: str | None) -> str | None:
    """The entry with the weights; None if `data` itself is the state dict."""
    there = [name for name in data if isinstance(data[name], Mapping)]
    if key is not None:
        if key not in there:
            raise WeightsError(
                f"--key {key!r}: {path} has no such dictionary; it has {few(there) or 'none'}"
            )
        return key
    for name in ENTRIES:
        if name in there:
            return name
    if any(isinstance(value, Tensor) for value in data.values()):
        return None
    raise WeightsError(
        f"{path} holds no weights: expected tensors, or one of {', '.join(ENTRIES)}; "
        f"found {few(data) or 'an empty dictionary'}"
    )


def _sort_out(state: Mapping[Any, Any], path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors with a model's names, wrappers' prefixes taken off; and the names of the rest.

    Where nothing is of ConvMAE's encoder, the file may be of any network: all tensors are taken.
    """
    known: dict[str, Tensor] = {}
    unexpected: list[str] = []
    is_network = not any(_unwrapped(str(given)).startswith(ENCODER) for given in state)
    for given, value in state.items():
        name = _unwrapped(str(given))
        if name.endswith(INDEX_BUFFER):  # of relative positions: it follows from the shapes
            unexpected.append(name)
            continue
        if is_network and (name in UNUSED or not isinstance(value, Tensor)):
            unexpected.append(name)
            continue
        if not is_network and not name.startswith((*ENCODER, *DECODER, *HEAD)):
            unexpected.append(name)
            continue
        if name in known:
            raise WeightsError(f"{path} holds {name} twice, as {given!r} and without")
        problem = _no_weight(value)
        if problem is not None:
            raise WeightsError(
                f"{path}: {name} is {problem}, expected a tensor of floating numbers"
            )
        known[name] = value.detach()
    return (network_tensors(known, path) if is_network else known), unexpected


def _drop_class_token(found: ForeignWeights) -> None:
    """Takes the row of a class token, which our models have not, off the position embedding."""
    position = found.state.get("pos_embed")
    if "cls_token" not in found.unexpected or position is None or position.dim() != 3:
        return
    patches = position.shape[1]
    if math.isqrt(patches) ** 2 != patches and math.isqrt(patches - 1) ** 2 == patches - 1:
        found.state["pos_embed"] = position[:, 1:]
        found.notes.append(f"pos_embed: the first of {patches} rows, of cls_token, is left out")


def _unwrapped(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name


def _no_weight(value: Any) -> str | None:
    """What is wrong with a value as a weight; None if nothing is."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if value.is_meta:
        return "a tensor without values"
    if value.layout != torch.strided or value.is_quantized:
        return "a sparse or quantised tensor"
    if has_part_only(value):
        return f"a tensor of shape {list(value.shape)} with values for a part of it only"
    if not value.is_floating_point() and value.numel() != 1:  # one: a counter of batches
        return f"a tensor of {str(value.dtype).removeprefix('torch.')}"
    return None


def few(names: Iterable[Any], most: int = 8) -> str:
    """The first names, and how many more there are."""
    texts = [str(name) for name in names]
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more
