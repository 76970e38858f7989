"""Seeds of everything random in a run: one table of streams, and no two draws with one seed.

Whatever is drawn has a seed of its own, made of the run's seed, its stream and its keys, and of
nothing that was drawn before. So a resumed run goes on as it would have, and a sample is the same
whichever process computes it. Weights are drawn from the run's seed itself, when a model is built.
"""

from __future__ import annotations

import hashlib
import random
import struct
from contextlib import contextmanager
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

SCHEME = 2  # raised when the same seed no longer gives the same numbers; kept in checkpoints


class Stream(IntEnum):
    """What is drawn, with its keys. A number is never given twice, and never changed."""

    CHOICE = 1  # what `max_samples` keeps: no key; what `val_share` holds out: (hash of the name,)
    ORDER = 2  # of the pictures, or the shards, of an epoch: (epoch,)
    BUFFER = 3  # the order in which a loading process empties its buffer: (epoch, reader)
    SAMPLE = 4  # crop, flip and augmentation of a training picture: (epoch, sample)
    EVALUATION = 5  # the transform of a picture that is evaluated: (index,)
    MASK = 6  # of a training picture: (epoch, sample), or other keys of a sample
    STEP = 7  # stochastic depth, mixup and erasing within a batch: (batch, process)
    PICTURE = 8  # masks of the pictures that a run draws, or `convmae reconstruct`: (index,)


def derive_seed(seed: int, stream: Stream, *keys: int) -> int:
    """A 63-bit seed for one draw: a hash of the run's seed, the stream, the keys and their number.

    Args:
        seed: of the run, from 0 to 2**64 - 1.
        stream: what is drawn.
        keys: which one of the stream, each from 0 to 2**64 - 1.

    Raises:
        ValueError: a seed or key that is negative or too large.
    """
    values = (seed, stream, len(keys), *keys)
    try:
        packed = struct.pack(f"<{len(values)}Q", *values)
    except struct.error as error:
        raise ValueError(
            f"seed and keys must be whole numbers from 0 to 2**64 - 1, got {seed} and {keys}"
        ) from error
    digest = hashlib.blake2b(packed, digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_everything(seed: int) -> None:
    """Seeds PyTorch on every device, NumPy and `random`: stochastic depth, mixup and erasing."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the global generators of torch (CPU), `random` and NumPy; puts their states back."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def generator_for(seed: int, stream: Stream, *keys: int) -> torch.Generator:
    """A generator on the CPU, seeded by `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, stream, *keys))


def mask_noise(keys: Tensor, patches: int, seed: int, stream: Stream = Stream.MASK) -> Tensor:
    """Uniform noise `[N, patches]` on the CPU, a row from `(seed, stream, *keys[n])` alone.

    A sample's mask does not depend on its batch, so neither on how many processes share it.

    Args:
        keys: int64 `[N, K]` on the CPU, non-negative.
        patches: how many numbers in a row.
        seed: of the run.
        stream: `MASK` of a training picture, `PICTURE` of one that is drawn.
    """
    return torch.stack(
        [torch.rand(patches, generator=generator_for(seed, stream, *key)) for key in keys.tolist()]
    )
