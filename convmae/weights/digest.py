"""Digests: whether a file is what was written, to the last bit.

The metadata of `model.safetensors` hold the SHA-256 of all its tensors (names, dtypes, shapes,
values) and of all other metadata, and that of the `training_state.pt` beside it. It is of what is
in the file, not of its bytes: a program that reads all and writes it again keeps it valid.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import torch

from convmae.config import WeightsError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

DIGEST = "digest"
STATE_DIGEST = "training_state"  # of the file beside it
# Says that there is a digest: so a bit that changes the name of the one or the other is noticed.
MARK, MARKED = "digest_of", "tensors and metadata"
_KIND = "sha256:"
_CHUNK = 1 << 22


def content_digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """`sha256:...` of metadata (but their own digest) and of tensors on the CPU, in any order."""
    digest = hashlib.sha256()
    others = sorted((key, value) for key, value in metadata.items() if key != DIGEST)
    digest.update(json.dumps(others).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return _KIND + digest.hexdigest()


def file_digest(path: Path) -> str:
    """`sha256:...` of all bytes of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            digest.update(chunk)
    return _KIND + digest.hexdigest()


def with_digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The metadata, with the digest of them and of the tensors."""
    marked = {**metadata, MARK: MARKED}
    return {**marked, DIGEST: content_digest(marked, tensors)}


def is_marked(metadata: Mapping[str, str]) -> bool:
    """Whether a file was written with a digest."""
    return DIGEST in metadata or MARK in metadata


def check_content(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Raises `WeightsError` where a file with a digest is not what was written."""
    if is_marked(metadata) and metadata.get(DIGEST) != content_digest(metadata, tensors):
        raise WeightsError(
            f"{path} is damaged, or another program changed it: its tensors and metadata are not "
            "those that its digest was made of. Take a copy that is whole; or, if it was changed "
            "on purpose, `convmae convert --ignore_digest` writes it anew as it is"
        )


def check_state(path: Path, metadata: Mapping[str, str]) -> None:
    """Raises `WeightsError` where a training state is not the one that its weights belong to.

    Args:
        path: the file of the training state.
        metadata: of the weights beside it; of those without a digest nothing is known.
    """
    if not is_marked(metadata) or metadata.get(STATE_DIGEST) == file_digest(path):
        return
    raise WeightsError(
        f"{path} is damaged, or not of the same checkpoint as the weights beside it: its digest "
        "is not the one that they name. Go on from a copy that is whole, or start a new run from "
        "the weights"
    )
