"""Dense maps and their `Packed`, for the tests of `Packed`."""

import pytest
import torch

import convmae_kernels as ck
from convmae_kernels import Packed
from convmae_kernels.packed import MaskedDense
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


def check_like_dense(function, last=False, channels=C, mask=MASK, exact=False):
    """A function of packed features gives what it gives of a dense map, and so does the twin.

    Compares values and gradients at visible positions, of maps `[B, C, H, W]` or, `last`,
    `[B, H, W, C]`, that are NaN where they are hidden. The function must not mix positions.
    """
    images = make_map(channels)

    def run(make):
        """The visible values of all results, and the gradient of the images."""
        leaf = images.clone().requires_grad_()
        x = make(leaf)
        results = function(x.permute(0, 2, 3, 1) if last else x)
        results = results if isinstance(results, (list, tuple)) else [results]
        return leaf, results

    leaf, packed = run(lambda x: Packed.gather(torch.where(mask.to_dense(SIDE), x, NAN), mask))
    assert all(isinstance(y, Packed) for y in packed)
    dense_leaf, dense = run(lambda x: x)
    twin_leaf, twin = run(lambda x: MaskedDense(x, mask).cleared())
    expected = [MaskedDense(y, mask, x.axes).masked() for x, y in zip(packed, dense, strict=True)]
    tolerance = {"rtol": 0, "atol": 0} if exact else {}
    gradients = []
    for results, of in (
        ([masked_dense(y) for y in packed], leaf),
        (expected, dense_leaf),
        ([y.masked() for y in twin], twin_leaf),
    ):
        loss = 0.0
        for y, wanted in zip(results, expected, strict=True):
            assert y.shape == wanted.shape
            assert y.dtype == wanted.dtype
            torch.testing.assert_close(y, wanted, **tolerance)
            if y.requires_grad:
                loss = loss + (y * torch.arange(y.numel()).view(y.shape).cos()).sum()
        if isinstance(loss, torch.Tensor):
            loss.backward()
            gradients.append(torch.where(mask.to_dense(SIDE), of.grad, 0))
    for gradient in gradients:
        torch.testing.assert_close(gradient, gradients[0])
    for x, y in zip(packed, twin, strict=True):
        assert (x.axes, x.shape, x.dtype) == (y.axes, y.shape, y.dtype)


def masked_dense(packed):
    """The dense map of a `Packed` of any dtype, 0 at hidden positions."""
    if packed.dtype.is_floating_point:
        return packed.dense()
    return packed.like(packed.features.double()).dense().to(packed.dtype)
