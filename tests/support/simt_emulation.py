"""What the tests of the emulated CUDA kernels share: calls of kernels, gather and scatter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from simt.emulator import module

from convmae_kernels.ops import reference
from convmae_kernels.testing import DTYPES, random_tensor

SEEDS = (0, 1, 2, 3)  # ascending, descending, random, random and interrupted
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
NAN, INF = float("nan"), float("inf")

all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def array(tensor):
    """The tensor as NumPy sees it; bfloat16, which NumPy lacks, as 16-bit integers."""
    tensor = tensor.contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def emulate(function, *arguments, like, seeds=SEEDS, checker="address", removed=None):
    """The outputs of a kernel, as tensors of the dtype of `like`; the same under every seed."""
    emulator = module("kernels", checker, removed)
    first = None
    for seed in seeds:
        results = emulator.call(function, *arguments, seed)
        results = results if isinstance(results, tuple) else (results,)
        if first is None:
            first = results
        for a, b in zip(first, results, strict=True):
            assert np.array_equal(bits(a), bits(b)), f"seed {seed} gives other bits"
    return [torch.from_numpy(r).view(like.dtype) if isinstance(r, np.ndarray) else r for r in first]


def bits(value):
    return np.asarray(value).reshape(-1).view(np.uint8)


def gather(images, mask, **options):
    gh, gw = mask.grid
    count = images.untyped_storage().nbytes() // images.element_size()
    storage = images.as_strided((count,), (1,), 0)
    return emulate(
        "gather_visible", array(storage), images.storage_offset(), list(images.stride()),
        mask.block_index.numpy(), images.shape[1], [gh, gw], images.shape[2] // gh, like=images,
        **options,
    )[0]  # fmt: skip


def scatter(x, mask, fill=0.0, offset=0, **options):
    value = array(torch.full((1,), fill, dtype=x.dtype))
    y = emulate(
        "scatter_visible", array(x), mask.block_index.numpy(), mask.batch_size, list(mask.grid),
        value, offset, like=x, **options,
    )[0]  # fmt: skip
    return y.permute(0, 3, 1, 2)


def images_for(mask, side, channels, dtype=torch.float32, layout="contiguous"):
    gh, gw = mask.grid
    return random_tensor((mask.batch_size, channels, gh * side, gw * side), dtype, layout)


def same(actual, expected):
    assert actual.shape == expected.shape
    assert np.array_equal(bits(array(actual)), bits(array(expected)))


def check_gather(images, mask):
    same(gather(images, mask), reference.gather_visible(images, mask.block_index, *mask.grid))


def check_scatter(x, mask, fill, offset=0):
    expected = reference.scatter_visible(x, mask.block_index, mask.batch_size, *mask.grid, fill)
    same(scatter(x, mask, fill, offset), expected)
