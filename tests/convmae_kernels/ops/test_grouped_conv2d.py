"""Convolution in groups of channels and its gradients: compiled kernels against the reference."""

import pytest
import torch

import convmae_kernels as ck
from convmae_kernels.ops import reference
from convmae_kernels.ops.support.dispatch import WHY_NOT_COMPILED
from convmae_kernels.testing import DTYPES, assert_within_budget, make_mask, random_tensor
from tests.support.instruction_sets import LOWER, run_tests

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty"),
    pytest.mark.skipif(WHY_NOT_COMPILED is not None, reason="the compiled library is not there"),
    pytest.mark.thorough(but_every=3),
]

OPS = torch.ops.convmae
# (groups, inputs and outputs of a group): less and more than a vector of any instruction set, with
# and without a remainder, several groups in a vector and the last vector not full of them.
WIDTHS = [
    (2, 1, 1), (5, 3, 3), (7, 4, 4), (3, 2, 5), (3, 5, 2), (13, 8, 8), (2, 4, 8), (3, 8, 12),
    (2, 16, 16), (2, 24, 17), (1, 33, 24), (2, 8, 40), (2, 56, 56), (2, 10, 130),
]  # fmt: skip
SHAPES = [  # side, kernel, stride, padding, dilation
    (4, (3, 3), 1, (1, 1), (1, 1)),
    (2, (3, 3), 2, (1, 1), (1, 1)),
    (1, (3, 5), 1, (1, 2), (1, 1)),
    (8, (2, 5), 4, (-1, 1), (1, 2)),
]


def make_problem(mask, width, shape, dtype, seed=0):
    """x, weight, bias, the gradient of the output, and what else the ops take."""
    torch.manual_seed(seed)
    (groups, in_channels, out_channels), (side, kernel, stride, padding, dilation) = width, shape
    x = random_tensor((mask.num_visible, side * side, groups * in_channels), dtype)
    weight = random_tensor((groups * out_channels, in_channels, *kernel), dtype)
    bias = random_tensor((groups * out_channels,), dtype)
    outputs = (side // stride) ** 2
    grad = random_tensor((mask.num_visible, outputs, groups * out_channels), dtype)
    return x, weight, bias, grad, (stride, padding, dilation, groups)


def everything(ops, tensors, shape, neighbours):
    """The convolution and its gradients, by the compiled ops or by the reference."""
    x, weight, bias, grad = tensors
    convolve = ops.window_conv2d if ops is reference else ops.grouped_conv2d
    return [
        convolve(x, weight, bias, neighbours, *shape),
        ops.grouped_conv2d_input_grad(grad, weight, neighbours, *shape),
        *ops.grouped_conv2d_weight_grad(grad, x, neighbours, weight.shape[2:], *shape),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS, ids=str)
def test_every_width(width, dtype):
    mask = make_mask("ragged")
    for shape in SHAPES:
        *tensors, options = make_problem(mask, width, shape, dtype)
        neighbours = mask.neighbours(2)
        found = everything(OPS, tensors, options, neighbours)
        plain = everything(reference, tensors, options, neighbours)
        exact = everything(reference, [t.double() for t in tensors], options, neighbours)
        terms = everything(reference, [t.double().abs() for t in tensors], options, neighbours)
        if dtype == torch.float64:  # then `plain` is `exact`, and errs by nothing
            torch.testing.assert_close(found, exact)
            continue
        for values in zip(found, exact, plain, terms, strict=True):
            assert_within_budget(*values, name=str(shape))


def test_the_reference_is_the_derivative_of_the_convolution():
    """The oracle's gradients are formulas of their own: they agree with autograd's."""
    mask = make_mask("ragged")
    for shape in SHAPES:
        *tensors, options = make_problem(mask, (3, 2, 5), shape, torch.float64)
        neighbours = mask.neighbours(2)
        x, weight, bias = leaves = [t.requires_grad_() for t in tensors[:3]]
        y = reference.window_conv2d(x, weight, bias, neighbours, *options)
        found = everything(reference, [*leaves, tensors[3]], options, neighbours)[1:]
        expected = torch.autograd.grad(y, leaves, tensors[3])
        for value, gradient in zip(found, expected, strict=True):
            torch.testing.assert_close(value, gradient)


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_derivatives_of_every_op(shape):
    """Each op alone, twice: what one differentiates into differentiates again."""
    mask = make_mask("row")
    *tensors, options = make_problem(mask, (2, 2, 1), shape, torch.float64)
    x, weight, bias, grad = (t.requires_grad_() for t in tensors)
    neighbours, kernel = mask.neighbours(2), weight.shape[2:]
    functions = [
        (lambda *xs: OPS.grouped_conv2d(*xs, neighbours, *options), (x, weight, bias)),
        (lambda *xs: OPS.grouped_conv2d_input_grad(*xs, neighbours, *options), (grad, weight)),
        (
            lambda *xs: OPS.grouped_conv2d_weight_grad(*xs, neighbours, kernel, *options),
            (grad, x),
        ),
    ]
    for function, inputs in functions:
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("side", [1, 2, 4])
def test_threads_change_no_bit(side, threads):
    mask = ck.BlockMask.random(3, (14, 14), 0.5)
    shape = (side, (3, 3), min(side, 2), (1, 1), (1, 1))
    *tensors, options = make_problem(mask, (4, 12, 8), shape, torch.float32)
    threads(1)
    expected = everything(OPS, tensors, options, mask.neighbours(1))
    for number in (2, 3, 2):
        threads(number)
        for a, b in zip(
            everything(OPS, tensors, options, mask.neighbours(1)), expected, strict=True
        ):
            assert torch.equal(a, b)


def test_a_table_that_is_too_small_is_refused():
    mask = make_mask("ragged")
    *tensors, options = make_problem(mask, (2, 2, 2), (2, (7, 7), 1, (3, 3), (1, 1)), torch.float32)
    for neighbours in (mask.neighbours(0), mask.neighbours(1)):
        with pytest.raises(RuntimeError, match="neighbours does not reach as far as the kernel"):
            everything(OPS, tensors, options, neighbours)
    everything(OPS, tensors, options, mask.neighbours(2))


@pytest.mark.parametrize(("level", "name"), LOWER)
@pytest.mark.thorough
def test_lower_instruction_sets(level, name):
    """The kernels for other machines, as far as this one can run them."""
    run_tests(__file__, "test_every_width", level, name)
