"""Convolution tap by tap and its gradients: where it is used, and what it computes."""

import pytest
import torch

import convmae_kernels as ck
from convmae_kernels.ops import reference, tap_conv2d
from convmae_kernels.testing import DTYPES, assert_within_budget, make_mask, random_tensor
from tests.support.conv_results import check_close
from tests.support.convolutions import CASES, make_inputs, mask_for, run, run_dense

pytestmark = [pytest.mark.usefixtures("poisoned_empty"), pytest.mark.thorough(but_every=3)]

OPS = torch.ops.convmae
SHAPES = [  # side, kernel, stride, padding, dilation
    (4, (3, 3), 1, (1, 1), (1, 1)),
    (4, (3, 3), 2, (1, 1), (1, 1)),
    (2, (2, 4), 1, (0, 2), (1, 1)),
    (2, (3, 3), 1, (2, 2), (2, 2)),
    (1, (5, 3), 1, (2, 1), (1, 1)),
    (4, (3, 3), 1, (-1, 0), (1, 2)),
    (4, (5, 5), 4, (1, 0), (1, 1)),
]


def make_problem(mask, shape, dtype, channels=(5, 3)):
    """x, weight, bias and the gradient of the output, and what else the ops take."""
    torch.manual_seed(0)
    side, kernel, *options = shape
    x = random_tensor((mask.num_visible, side * side, channels[0]), dtype)
    weight = random_tensor((channels[1], channels[0], *kernel), dtype)
    bias = random_tensor((channels[1],), dtype)
    grad = random_tensor((mask.num_visible, (side // options[0]) ** 2, channels[1]), dtype)
    return (x, weight, bias, grad), options


def by_taps(tensors, neighbours, options):
    x, weight, bias, grad = tensors
    return [
        OPS.tap_conv2d(x, weight, bias, neighbours, *options),
        OPS.tap_conv2d_input_grad(grad, weight, neighbours, *options),
        *OPS.tap_conv2d_weight_grad(grad, x, neighbours, weight.shape[2:], *options),
    ]


def by_reference(tensors, neighbours, options):
    x, weight, bias, grad = tensors
    return [
        reference.window_conv2d(x, weight, bias, neighbours, *options, 1),
        reference.grouped_conv2d_input_grad(grad, weight, neighbours, *options, 1),
        *reference.grouped_conv2d_weight_grad(grad, x, neighbours, weight.shape[2:], *options, 1),
    ]


@pytest.mark.parametrize("kind", ["ragged", "all", "row", "single_block"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, kind):
    mask = make_mask(kind)
    for dtype in (torch.float64, torch.float32):
        tensors, options = make_problem(mask, shape, dtype)
        found = by_taps(tensors, mask.neighbours(2), options)
        wide = [t.double() for t in tensors]
        exact = by_reference(wide, mask.neighbours(2), options)
        if dtype == torch.float64:
            torch.testing.assert_close(found, exact)
            continue
        plain = by_reference(tensors, mask.neighbours(2), options)
        terms = by_reference([t.abs() for t in wide], mask.neighbours(2), options)
        for values in zip(found, exact, plain, terms, strict=True):
            assert_within_budget(*values, name=str(shape))


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[4]], ids=str)
def test_derivatives_of_every_op(shape):
    mask = make_mask("row")
    tensors, options = make_problem(mask, shape, torch.float64, (2, 2))
    x, weight, bias, grad = (t.requires_grad_() for t in tensors)
    neighbours, kernel = mask.neighbours(2), weight.shape[2:]
    for function, inputs in [
        (lambda *xs: OPS.tap_conv2d(*xs, neighbours, *options), (x, weight, bias)),
        (lambda *xs: OPS.tap_conv2d_input_grad(*xs, neighbours, *options), (grad, weight)),
        (lambda *xs: OPS.tap_conv2d_weight_grad(*xs, neighbours, kernel, *options), (grad, x)),
    ]:
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_nothing_visible():
    mask = make_mask("none")
    for shape in SHAPES:
        tensors, options = make_problem(mask, shape, torch.float32)
        found = by_taps(tensors, mask.neighbours(2), options)
        expected = by_reference(tensors, mask.neighbours(2), options)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("case", [case for case in CASES if case.path == "product"], ids=str)
def test_every_convolution_that_is_a_product(case, monkeypatch):
    """Of any channels, against PyTorch's convolution of the dense map."""
    monkeypatch.setattr(tap_conv2d, "LEAST_CHANNELS", 1)
    mask = mask_for(case)
    inputs = make_inputs(case, mask)
    with torch.autograd.profiler.profile() as profile:
        found = run(case, mask, inputs)
    names = {event.name for event in profile.function_events}
    assert {"convmae::tap_conv2d", "convmae::tap_conv2d_weight_grad"} < names
    check_close(found, run_dense(case, mask, inputs))


LEAST = tap_conv2d.LEAST_CHANNELS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("side", "channels", "used"),
    [(2, (LEAST, LEAST), True), (2, (LEAST - 1, LEAST), False), (2, (LEAST, LEAST - 1), False),
     (8, (LEAST, LEAST), False)],
    ids=str,
)  # fmt: skip
def test_where_it_is_used(side, channels, used, layout, dtype):
    """Where channels are many and outputs few; a half type is rounded once, not after each tap."""
    mask = make_mask("ragged")
    tensors, options = make_problem(mask, (side, (3, 3), 1, (1, 1), (1, 1)), dtype, channels)
    x, weight, bias, grad = tensors
    weight = weight.contiguous(memory_format=layout)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    with torch.autograd.profiler.profile() as profile:
        y = ck.masked_conv2d(*leaves, mask)
        grads = torch.autograd.grad(y, leaves, grad)
    names = {event.name for event in profile.function_events}
    wide = dtype.itemsize > 2 or ck.ops.support.arithmetic.product_dtype(x) == torch.float32
    assert ("convmae::tap_conv2d" in names) == (used and wide)
    assert ("convmae::tap_conv2d_input_grad" in names) == (used and wide)
    sources = [x.detach(), weight.detach(), bias.detach(), grad]
    neighbours = mask.neighbours(1)
    exact = by_reference([t.double() for t in sources], neighbours, options)
    found = [y.detach(), *grads]
    if dtype == torch.float64:  # then PyTorch's own way would err by nothing
        torch.testing.assert_close(found, exact)
        return
    plain = by_reference(sources, neighbours, options)
    terms = by_reference([t.double().abs() for t in sources], neighbours, options)
    for values in zip(found, exact, plain, terms, strict=True):
        assert_within_budget(*values, name=str(channels))


def test_the_gradient_has_the_layout_of_channels_last_weights():
    """So that autograd takes it as it is, without a copy."""
    mask = make_mask("ragged")
    (x, weight, _, grad), options = make_problem(mask, SHAPES[0], torch.float32)
    found, _ = OPS.tap_conv2d_weight_grad(grad, x, mask.neighbours(1), weight.shape[2:], *options)
    assert found.stride() == weight.to(memory_format=torch.channels_last).stride()
