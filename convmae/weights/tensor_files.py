"""Files of tensors, written and read: safetensors, and what `torch.save` writes."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import torch

from convmae.config import WeightsError
from convmae.weights.digest import check_content
from convmae.weights.header import read_metadata

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


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


def save_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """A safetensors file with the rights of any new file; an `OSError` where the disk refuses."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:  # a full disk, too
        raise _refused(path, error) from error
    path.chmod(mode)  # safetensors lets nobody else read its files


def read_safetensors(
    file: Path, ignore_digest: bool = False
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file of any origin; its digest is checked, if any.

    Raises:
        WeightsError: it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    metadata = read_metadata(file)
    try:
        with safe_open(file, framework="pt") as opened:
            state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file} is not readable as safetensors: {error}") from error
    if not ignore_digest:
        check_content(file, metadata, state)
    return metadata, state
