"""Convolutions of maps with a token at hidden positions, against PyTorch's of the dense map."""

from functools import partial

import pytest
import torch
from torch.nn.functional import conv2d, conv_transpose2d
from torch.utils.flop_counter import FlopCounterMode

from convmae.models.cnn import visible_convolution
from convmae.models.cnn.visible_convolution import (
    convolve_with_token,
    fill_with_token,
    project_with_token,
    up_sample_with_token,
)
from convmae_kernels import BlockMask
from convmae_kernels.ops.support import arithmetic
from convmae_kernels.testing import (
    MASKS,
    assert_within_budget,
    make_mask,
    random_tensor,
    value_and_grads,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty")

IN, OUT = 5, 6
KERNELS = (1, 3, 5, 4)  # 4: the up-sampling
CASES = [(3, 1), (3, 2), (3, 4), (3, 8), (1, 1), (1, 8), (4, 1), (4, 4), (5, 1)]
NAMES = ("output", "features", "token", "weight", "bias")


def convolve_dense(kernel, mask, features, token, weight, bias=None):
    channels = features.shape[2]
    visible = mask.to_dense(int(features.shape[1] ** 0.5))
    maps = token.view(1, channels, 1, 1) + torch.zeros_like(visible, dtype=token.dtype)
    scattered = fill_with_token(features, mask, token.detach() * 0)
    maps = torch.where(visible, scattered, maps)
    if kernel == 4:
        return conv_transpose2d(maps, weight, bias, 2, padding=1)
    return conv2d(maps, weight, bias, padding=kernel // 2)


def convolve(kernel, mask, features, token, weight, bias=None):
    function = up_sample_with_token if kernel == 4 else convolve_with_token
    return function(features, mask, token, weight, bias)


def operands(kernel, mask, side, dtype=torch.float64, channels=(IN, OUT)):
    """Features, token, weight, bias, and a gradient of the result."""
    inside, outside = channels
    shape = (inside, outside, 4, 4) if kernel == 4 else (outside, inside, kernel, kernel)
    out_side = 2 * side if kernel == 4 else side
    return (
        random_tensor((mask.num_visible, side * side, inside), dtype),
        random_tensor((1, inside, 1, 1), dtype),
        random_tensor(shape, dtype) / (inside * kernel**2) ** 0.5,
        random_tensor((outside,), dtype),
    ), random_tensor((mask.batch_size, outside, *(n * out_side for n in mask.grid)), dtype)


@pytest.fixture
def always_products(monkeypatch):
    """Whatever is visible, nothing is computed the dense way."""
    monkeypatch.setattr(visible_convolution, "DENSE_FROM", 2.0)


# -- values ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("always_products")
@pytest.mark.parametrize(("kernel", "side"), CASES)
@pytest.mark.parametrize("name", MASKS)
def test_values_and_gradients(name, side, kernel):
    mask = make_mask(name)
    inputs, grad = operands(kernel, mask, side)
    found = value_and_grads(partial(convolve, kernel, mask), inputs, grad)
    expected = value_and_grads(partial(convolve_dense, kernel, mask), inputs, grad)
    for what, a, b in zip(NAMES, found, expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda m, w=what: f"{w}: {m}")
    assert found[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kernel", [3, 4])
@pytest.mark.parametrize("name", ["all", "ragged"])
def test_the_dense_way_is_taken_where_little_is_hidden(name, kernel):
    mask = make_mask(name)
    inputs, grad = operands(kernel, mask, 2)
    with FlopCounterMode(display=False) as counter:
        found = value_and_grads(partial(convolve, kernel, mask), inputs, grad)
    counted = counter.get_flop_counts()["Global"]
    assert (torch.ops.aten.convolution in counted) == (name == "all")
    expected = value_and_grads(partial(convolve_dense, kernel, mask), inputs, grad)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert found[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kernel", KERNELS)
def test_without_images_or_bias(kernel):
    empty = BlockMask.full(0, (2, 3))
    (features, token, weight, bias), _ = operands(kernel, empty, 2)
    y = convolve(kernel, empty, features, token, weight, bias)
    side = 4 if kernel == 4 else 2
    assert y.shape == (0, OUT, 2 * side, 3 * side)
    mask = make_mask("ragged")
    (features, token, weight, _), _ = operands(kernel, mask, 2)
    y = convolve(kernel, mask, features, token.flatten(), weight)
    expected = convolve_dense(kernel, mask, features, token, weight)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_projection_of_rows_and_token():
    mask = make_mask("ragged")
    inputs, grad = operands(1, mask, 2)

    def projected(features, token, weight, bias):
        rows, token = project_with_token(features, token, weight, bias)
        assert token.shape == (OUT,)
        return fill_with_token(rows, mask, token)

    found = value_and_grads(projected, inputs, grad)
    expected = value_and_grads(partial(convolve_dense, 1, mask), inputs, grad)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", [1, 3, 4])
def test_derivatives_by_finite_differences(kernel):
    mask = BlockMask.from_visible(torch.tensor([[[True, False]], [[False, False]]]))
    inputs, _ = operands(kernel, mask, 2, channels=(2, 1))
    leaves = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(partial(convolve, kernel, mask), leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(partial(convolve, kernel, mask), leaves, fast_mode=True)


@pytest.mark.parametrize("kernel", [3, 4])
def test_a_value_reaches_its_neighbours_only(kernel):
    """NaN at one visible position, as an overflow makes it, stays as local as in the dense map."""
    mask = make_mask("ragged")
    (features, token, weight, bias), _ = operands(kernel, mask, 4)
    features[0, 0] = float("nan")  # image 0, row 0, column 0
    y = convolve(kernel, mask, features, token, weight, bias)
    reach = 3 if kernel == 4 else 2
    assert y[0, :, :reach, :reach].isnan().all()
    y[0, :, :reach, :reach] = 0
    assert y.isfinite().all()


# -- arithmetic -----------------------------------------------------------------------------------


@pytest.mark.parametrize("slow", [True, False], ids=["multiplied wider", "multiplied as it is"])
@pytest.mark.parametrize("kernel", [1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_are_those_of_the_dense_map(dtype, kernel, slow, monkeypatch):
    half = frozenset({torch.bfloat16, torch.float16})
    monkeypatch.setattr(arithmetic, "SLOW_ON_CPU", half if slow else frozenset())
    mask = make_mask("ragged")
    inputs, grad = operands(kernel, mask, 4, dtype, channels=(32, 16))
    results = [
        value_and_grads(partial(function, kernel, mask), arguments, g)
        for function, arguments, g in (
            (convolve, inputs, grad),
            (convolve_dense, [x.double() for x in inputs], grad.double()),
            (convolve_dense, inputs, grad),
            (convolve_dense, [x.double().abs() for x in inputs], grad.double().abs()),
        )
    ]
    for name, found, exact, plain, terms in zip(NAMES, *results):
        assert_within_budget(found, exact, plain, terms, name)


@pytest.mark.parametrize("kernel", [1, 3, 4])
def test_autocast(kernel):
    mask = make_mask("ragged")
    inputs, grad = operands(kernel, mask, 2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_grads(partial(convolve, kernel, mask), inputs, grad.bfloat16())
    assert found[0].dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in found[1:])
    rounded = [x.bfloat16() for x in inputs]
    expected = value_and_grads(partial(convolve, kernel, mask), rounded, grad.bfloat16())
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=0, atol=0)


@pytest.mark.parametrize("kernel", [3, 4])
def test_compiled_whole(kernel):
    mask = make_mask("equal")
    inputs, grad = operands(kernel, mask, 2)
    compiled = torch.compile(partial(convolve, kernel), backend="aot_eager", fullgraph=True)
    found = value_and_grads(partial(compiled, mask), inputs, grad)
    expected = value_and_grads(partial(convolve, kernel, mask), inputs, grad)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)


def test_the_same_bits_every_time(threads):
    mask = make_mask("ragged")
    inputs, grad = operands(3, mask, 8, torch.float32, channels=(32, 16))
    results = []
    for number in (1, 2, 2):
        threads(number)
        results.append(value_and_grads(partial(convolve, 3, mask), inputs, grad))
    for a, b in zip(results[1], results[2]):
        assert torch.equal(a, b)
    assert torch.equal(results[0][0], results[1][0])


# -- what it costs --------------------------------------------------------------------------------


def count(function):
    with FlopCounterMode(display=False) as counter:
        result = function()
    return counter.get_total_flops(), result


@pytest.mark.parametrize("kernel", [1, 3, 4])
def test_operations_are_those_of_visible_positions(kernel):
    mask, side = make_mask("ragged"), 4
    inputs, grad = operands(kernel, mask, side)
    leaves = [x.requires_grad_() for x in inputs]
    forward, y = count(lambda: convolve(kernel, mask, *leaves))
    backward, _ = count(lambda: torch.autograd.grad(y, leaves, grad))
    rows = mask.num_visible * side**2 + 2  # the token's and that of zeros
    products = 2 * rows * kernel**2 * IN * OUT
    positions = y.numel() // OUT
    assert forward == products
    assert backward == 2 * products + 2 * positions * kernel**2 * OUT  # of the token's products


def test_what_is_kept_for_the_backward_pass():
    mask, side = BlockMask.random(2, (7, 7), 0.6), 4
    inputs, _ = operands(3, mask, side, torch.float32, channels=(64, 32))
    kept = {}

    def note(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        y = convolve(3, mask, *[x.requires_grad_() for x in inputs])
    positions = y.numel() // y.shape[1]
    rows = (mask.num_visible * side**2 + 2) * 64 * 4
    weights, table, blocks = 2 * inputs[2].numel() * 4, positions * 9 * 4, mask.num_visible * 8
    assert sum(kept.values()) <= rows + weights + table + blocks


# -- what does not fit ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"token": (1, IN + 1, 1, 1)}, r"token must be \[5\] or \[1, 5, 1, 1\]"),
        ({"weight": (OUT, IN + 1, 3, 3)}, "weight must have 4 dimensions and 5 channels"),
        ({"weight": (OUT, IN, 2, 2)}, "with an odd k"),
        ({"weight": (OUT, IN, 3, 1)}, "with an odd k"),
        ({"bias": (OUT + 1,)}, r"bias must be \[6\]"),
        ({"features": (3, 4, IN)}, "features has 3 blocks"),
    ],
)
def test_wrong_shapes(wrong, message):
    mask = make_mask("ragged")
    names = ("features", "token", "weight", "bias")
    values = dict(zip(names, operands(3, mask, 2)[0]))
    values |= {name: random_tensor(shape, torch.float64) for name, shape in wrong.items()}
    with pytest.raises(ValueError, match=message):
        convolve_with_token(**values, mask=mask)


def test_wrong_kernels_of_the_others():
    mask = make_mask("ragged")
    (features, token, weight, bias), _ = operands(3, mask, 2, channels=(IN, IN))
    with pytest.raises(ValueError, match=r"weight must be \[C_in, C_out, 4, 4\]"):
        up_sample_with_token(features, mask, token, weight, bias)
    with pytest.raises(ValueError, match=r"weight must be \[C_out, C_in, 1, 1\]"):
        project_with_token(features, token, weight, bias)
    with pytest.raises(TypeError, match="token is torch.float32, but features is torch.float64"):
        convolve_with_token(features, mask, token.float(), weight, bias)
