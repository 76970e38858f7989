"""Dense maps and their `Packed`, for the tests of `Packed`."""

import pytest
import torch

import convmae_kernels as ck
from convmae_kernels import Packed
from convmae_kernels.testing import make_mask, random_tensor

NAN, INF = float("nan"), float("inf")
B, C, H, W, SIDE = 4, 6, 12, 16, 4  # of the maps of the mask "ragged", whose second image is hidden
MASK = make_mask("ragged")
VISIBLE = MASK.to_dense(SIDE)
both_layouts = pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])


def make_map(channels=C, dtype=torch.float64):
    return random_tensor((B, channels, H, W), dtype)


def hide(images, value=NAN):
    """The images with `value` in hidden positions."""
    return torch.where(VISIBLE, images, value)


def pack(images, last=False, mask=MASK):
    packed = Packed.gather(images, mask)
    return packed.permute(0, 2, 3, 1) if last else packed


def as_rows(dense, last=False):
    """The visible values of a dense map, as packed features."""
    return ck.gather_visible(dense.permute(0, 3, 1, 2) if last else dense, MASK)


def assert_same(packed, dense, last=False, exact=False):
    """A `Packed` has the shape, the dtype and, at visible positions, the values of a dense map."""
    assert isinstance(packed, Packed)
    assert packed.shape == dense.shape
    assert packed.dtype == dense.dtype
    if dense.dtype == torch.bool:
        packed, dense, exact = packed.float(), dense.float(), True
    tolerance = {"rtol": 0, "atol": 0} if exact else {}
    torch.testing.assert_close(packed.features, as_rows(dense, last), equal_nan=True, **tolerance)


def values_of(images, index):
    """`[C, n]`: the visible values of one image."""
    return images[index][:, VISIBLE[index, 0]]
