"""Depthwise convolution with a stride, an even kernel or one off its centre, and its gradients."""

import pytest
import torch

import convmae_kernels as ck
from convmae_kernels.ops import reference
from convmae_kernels.ops.support.dispatch import WHY_NOT_COMPILED
from convmae_kernels.testing import (
    DTYPES,
    MASKS,
    make_mask,
)
from tests.support.conv_results import check_close
from tests.support.convolutions import Case, make_inputs, run, run_dense
from tests.support.instruction_sets import LOWER, run_tests
from tests.support.strided_conv2d import SHAPES, check_results, make_problem, strided_results

pytestmark = pytest.mark.usefixtures("poisoned_empty")
compiled = pytest.mark.skipif(
    WHY_NOT_COMPILED is not None, reason="the compiled library is not there"
)

OPS = torch.ops.convmae
NAN = float("nan")
CHANNELS = [1, 5, 16, 51, 96]  # with and without a rest, of vectors and of pieces of several


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_shape(dtype):
    torch.manual_seed(0)
    mask = make_mask("ragged")
    neighbours = mask.neighbours(2)
    for i, shape in enumerate(SHAPES):
        for channels in CHANNELS if i == 0 else [CHANNELS[i % 5]]:
            tensors, rest = make_problem(mask, channels, shape, dtype)
            found = strided_results(OPS, tensors, neighbours, rest)
            check_results(found, tensors, neighbours, rest)


DENSE = [
    Case("strided", 4, (5, 5), (3, 3), stride=2, groups=5),
    Case("strided", 2, (3, 3), (7, 4), stride=2, groups=3, padding=(3, 1)),
    Case("strided", 8, (2, 2), (15, 2), stride=4, groups=2, padding=(6, 0)),
]


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_every_mask_against_the_dense_convolution(case):
    for mask in map(make_mask, MASKS):
        inputs = make_inputs(case, mask)
        check_close(run(case, mask, inputs), run_dense(case, mask, inputs))


def test_the_reference_is_the_derivative_of_the_convolution():
    """The oracle's gradients are formulas of their own: they agree with autograd's."""
    mask = make_mask("ragged")
    neighbours = mask.neighbours(2)
    for shape in SHAPES:
        (*leaves, grad), options = make_problem(mask, 3, shape)
        leaves = [t.requires_grad_() for t in leaves]
        y = reference.strided_conv2d(*leaves, neighbours, *options)
        found = strided_results(reference, [*leaves, grad], neighbours, options)[1:]
        expected = torch.autograd.grad(y, leaves, grad)
        torch.testing.assert_close(found, list(expected))


@pytest.mark.parametrize("shape", [SHAPES[i] for i in (1, 3, 7)], ids=str)
def test_derivatives_of_every_op(shape):
    """Each op alone, twice: what one differentiates into differentiates again."""
    mask = make_mask("row")
    tensors, options = make_problem(mask, 2, shape)
    x, weight, bias, grad = (t.requires_grad_() for t in tensors)
    neighbours, kernel = mask.neighbours(2), weight.shape[2:]
    functions = [
        (lambda *xs: OPS.strided_conv2d(*xs, neighbours, *options), (x, weight, bias)),
        (lambda *xs: OPS.strided_conv2d_input_grad(*xs, neighbours, *options), (grad, weight)),
        (lambda *xs: OPS.strided_conv2d_weight_grad(*xs, neighbours, kernel, *options), (grad, x)),
    ]
    for function, inputs in functions:
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@compiled
@pytest.mark.parametrize("side", [2, 8])
def test_threads_change_no_bit(side, threads):
    mask = ck.BlockMask.random(3, (14, 14), 0.5)
    tensors, options = make_problem(mask, 40, (side, (3, 3), 2, (1, 1), (1, 1)), torch.float32)
    results = []
    for number in (1, 2, 3):
        threads(number)
        results.append(strided_results(OPS, tensors, mask.neighbours(1), options))
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, results[0], strict=True))


def test_hidden_positions_are_not_read():
    """Rows of hidden blocks are NaN, and the table does not name them."""
    mask = make_mask("ragged")
    tensors, options = make_problem(mask, 5, SHAPES[0], torch.float32)
    neighbours = mask.neighbours(1)
    hidden = torch.zeros(mask.num_visible, dtype=torch.bool)
    hidden[[1, 4]] = True
    table = torch.where(hidden[neighbours.long().clamp(min=0)] & (neighbours >= 0), -1, neighbours)
    table = table.int()
    clean = [torch.where(hidden[:, None, None], 0, t) if t.dim() == 3 else t for t in tensors]
    dirty = [torch.where(hidden[:, None, None], NAN, t) if t.dim() == 3 else t for t in tensors]
    for i in (0, 1):  # what hidden rows give themselves is nobody's
        a, b = (strided_results(OPS, ts, table, options)[i] for ts in (clean, dirty))
        assert torch.equal(a[~hidden], b[~hidden])
    assert b[~hidden].isfinite().all()


@compiled
def test_arguments_that_do_not_fit_are_refused():
    mask = make_mask("ragged")
    tensors, options = make_problem(mask, 2, (2, (7, 7), 2, (3, 3), (1, 1)), torch.float32)
    with pytest.raises(RuntimeError, match="neighbours does not reach as far as the kernel"):
        strided_results(OPS, tensors, mask.neighbours(1), options)
    strided_results(OPS, tensors, mask.neighbours(2), options)
    x, weight, bias, grad = tensors
    table, kernel = mask.neighbours(2), weight.shape[2:]
    for call, message in (
        (lambda: OPS.strided_conv2d(x, weight[:1], None, table, *options), "weight must be"),
        (lambda: OPS.strided_conv2d(x, weight.double(), None, table, *options), "the dtype of the"),
        (lambda: OPS.strided_conv2d(x, weight, bias[:1], table, *options), "bias must be"),
        (lambda: OPS.strided_conv2d(x, weight, None, table, 4, *options[1:]), "stride must divide"),
        (lambda: OPS.strided_conv2d(x, weight, None, table, 3, *options[1:]), "power of two"),
        (lambda: OPS.strided_conv2d_weight_grad(x, x, table, kernel, *options), "grad must have"),
        (lambda: OPS.strided_conv2d_input_grad(grad[:3], weight, table, *options), "neighbours"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


@compiled
@pytest.mark.parametrize(("level", "name"), LOWER)
@pytest.mark.thorough
def test_lower_instruction_sets(level, name):
    """The kernels for other machines, as far as this one can run them."""
    run_tests(__file__, "test_every_shape", level, name)
