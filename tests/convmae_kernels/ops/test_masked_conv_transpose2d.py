"""Transposed convolutions whose kernel is their stride, against PyTorch's on dense maps."""

import pytest
import torch
import torch.nn.functional as F

import convmae_kernels as ck
from convmae_kernels.ops.support import arithmetic
from convmae_kernels.testing import (
    DTYPES,
    assert_within_budget,
    implementations,
    make_mask,
    random_tensor,
    value_and_grads,
)
from tests.support.conv_results import NAMES, check_close

pytestmark = pytest.mark.usefixtures("poisoned_empty")

all_impls = pytest.mark.parametrize("impl", implementations())
HALF = (torch.bfloat16, torch.float16)
NAN = float("nan")


TRANSPOSED = [(1, 3, 5, 2), (2, 4, 3, 2), (4, 2, 3, 4), (8, 3, 2, 1), (1, 2, 3, 32), (16, 2, 1, 2)]
every_transposed = pytest.mark.parametrize(("side", "c_in", "c_out", "stride"), TRANSPOSED)


def make_transposed(mask, side, c_in, c_out, stride, dtype=torch.float64, layout="contiguous"):
    shapes = (
        (mask.num_visible, side**2, c_in),
        (c_in, c_out, stride, stride),
        (c_out,),
        (mask.num_visible, (side * stride) ** 2, c_out),
    )
    return [random_tensor(shape, dtype, layout) for shape in shapes]


def run_transposed(mask, stride, inputs):
    *arguments, grad = inputs
    return value_and_grads(
        lambda *xs: ck.masked_conv_transpose2d(*xs, mask, stride), arguments, grad
    )


def run_transposed_dense(mask, stride, inputs):
    *arguments, grad = inputs

    def dense(x, weight, bias):
        y = F.conv_transpose2d(ck.scatter_visible(x, mask, impl="reference"), weight, bias, stride)
        return ck.gather_visible(y, mask, impl="reference")

    return value_and_grads(dense, arguments, grad)


@every_transposed
@pytest.mark.parametrize("name", ["ragged", "none", "all"])
def test_transposed_values_and_gradients(side, c_in, c_out, stride, name):
    mask = make_mask(name)
    for layout in ("contiguous", "sliced", "transposed"):
        inputs = make_transposed(mask, side, c_in, c_out, stride, layout=layout)
        expected = run_transposed_dense(mask, stride, inputs)
        check_close(run_transposed(mask, (stride, stride), inputs), expected)


@pytest.mark.parametrize("slow", [True, False])
@every_transposed
def test_transposed_in_every_dtype(side, c_in, c_out, stride, slow, monkeypatch):
    monkeypatch.setattr(arithmetic, "SLOW_ON_CPU", frozenset(HALF if slow else ()))
    mask = make_mask("ragged")
    for dtype in DTYPES:
        inputs = make_transposed(mask, side, c_in, c_out, stride, dtype)
        exact = run_transposed_dense(mask, stride, [x.double() for x in inputs])
        terms = run_transposed_dense(mask, stride, [x.double().abs() for x in inputs])
        plain = run_transposed_dense(mask, stride, inputs)
        found = run_transposed(mask, stride, inputs)
        for values in zip(found, exact, plain, terms, NAMES, strict=True):
            assert_within_budget(*values)
        if slow and dtype in HALF:
            wide = run_transposed(mask, stride, [x.float() for x in inputs])
            assert torch.equal(found[0], wide[0].to(dtype))


def test_transposed_without_bias_and_its_derivatives():
    mask = make_mask("row")
    x, weight, bias, _ = make_transposed(mask, 1, 2, 3, 2)
    y = ck.masked_conv_transpose2d(x, weight, None, mask, 2)
    assert torch.equal(y, ck.masked_conv_transpose2d(x, weight, torch.zeros_like(bias), mask, 2))
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    conv = lambda *xs: ck.masked_conv_transpose2d(*xs, mask, 2)  # noqa: E731
    assert torch.autograd.gradcheck(conv, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(conv, inputs, fast_mode=True)


def test_transposed_under_autocast():
    mask = make_mask("ragged")
    x, weight, bias, _ = make_transposed(mask, 2, 4, 3, 2)
    with torch.autocast("cpu", torch.bfloat16):
        half = ck.masked_conv_transpose2d(x.float(), weight.float(), bias.float(), mask, 2)
        double = ck.masked_conv_transpose2d(x, weight.float(), bias.float(), mask, 2)
    assert half.dtype == torch.bfloat16
    exact = ck.masked_conv_transpose2d(x, weight, bias, mask, 2)
    torch.testing.assert_close(half.double(), exact, rtol=0.05, atol=0.05)
    rounded = (weight.float().double(), bias.float().double())
    assert torch.equal(double, ck.masked_conv_transpose2d(x, *rounded, mask, 2))


def test_transposed_undoes_patches():
    mask = make_mask("ragged")
    x = random_tensor((mask.num_visible, 64, 3), torch.float64)
    weight = torch.linalg.qr(random_tensor((48, 48), torch.float64))[0].view(48, 3, 4, 4)
    patches = ck.masked_conv2d(x, weight, None, mask, stride=4, padding=0)
    back = ck.masked_conv_transpose2d(patches, weight, None, mask, stride=4)
    torch.testing.assert_close(back, x)


# -- bad input ----------------------------------------------------------------------------------

MASK = make_mask("equal")  # 2 images, 3 x 4 blocks, 8 of them visible
X, WEIGHT, BIAS = torch.zeros(8, 16, 4), torch.zeros(6, 4, 3, 3), torch.zeros(6)
TRANSPOSED_WEIGHT = torch.zeros(4, 6, 2, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mask": MASK.visible}, TypeError, "mask must be a BlockMask, got Tensor"),
        ({"x": X[0]}, ValueError, r"x must be packed features .* got 2 dimensions"),
        ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
        ({"weight": TRANSPOSED_WEIGHT.half()}, TypeError, "weight is torch.float16, but x is"),
        ({"weight": TRANSPOSED_WEIGHT[:3]}, ValueError, r"C_in=4, .* got \[3, 6, 2, 2\]"),
        (
            {"weight": WEIGHT[:4], "bias": None},
            ValueError,
            r"padding must keep .* must be 1, got padding=\(0, 0\)",
        ),
        ({"weight": TRANSPOSED_WEIGHT[0]}, ValueError, r"weight must be .* got \[6, 2, 2\]"),
        ({"bias": BIAS[:4]}, ValueError, r"bias must be \[6\], got \[4\]"),
        ({"stride": 3}, ValueError, "stride must be a power of two, .* side 4 .* got 3"),
        ({"stride": 16}, ValueError, "stride must be .* at most 32, got 16"),
        ({"stride": (2, 4)}, ValueError, r"stride must be .* same in both directions.* \(2, 4\)"),
        ({"stride": 0}, ValueError, "stride must be a positive integer or a pair of them, got 0"),
        ({"stride": None}, ValueError, "stride must be a positive integer or a pair .* got None"),
    ],
)
def test_transposed_rejects(arguments, error, message):
    good = {"x": X, "weight": TRANSPOSED_WEIGHT, "bias": BIAS, "mask": MASK, "stride": 2}
    assert ck.masked_conv_transpose2d(**good).shape == (8, 64, 6)
    with pytest.raises(error, match=message):
        ck.masked_conv_transpose2d(**{**good, **arguments})
