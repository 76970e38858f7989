"""Values, gradients and second derivatives of Triton's kernels against the reference."""

import functools

import pytest
import torch

import convmae_kernels as ck
from convmae_kernels.ops import reference
from convmae_kernels.ops.support.geometry import reach
from convmae_kernels.testing import (
    DTYPES,
    LAYOUTS,
    MASKS,
    assert_within_budget,
    dense_masked_conv2d,
    implementations,
    make_mask,
    oracle,
    random_tensor,
    value_and_grads,
)
from convmae_kernels.triton import add_layer_norm_grad, bias_gelu_grad
from convmae_kernels.triton import masked_conv2d_grads as grads_module
from convmae_kernels.triton import masked_conv2d_weight_grad as weight_grad_module
from tests.support.rows import check_add_layer_norm, check_bias_gelu
from tests.support.strided_conv2d import SHAPES, check_results, make_problem, strided_results

pytestmark = pytest.mark.usefixtures("poisoned_empty", "few_programs")

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EDGES = [(1, 255), (2, 7), (2, 1), (1, 8)]  # block side, channels
EVERY_CASE = [
    # Every mask and every layout meets every edge.
    (name, layout, *EDGES[(i + j) % len(EDGES)])
    for i, name in enumerate(MASKS)
    for j, layout in enumerate(LAYOUTS[:4])
]
cases = pytest.mark.parametrize(("name", "layout", "side", "channels"), EVERY_CASE)
NAMES = ("y", "grad_x", "grad_weight", "grad_bias", "second in x", "in weight", "in grad")


def make_inputs(mask, side, channels, kernel, dtype=torch.float32, layout="contiguous"):
    """x, weight, bias, the gradient of y, and the gradients of the first three's gradients."""
    packed = (mask.num_visible, side * side, channels)
    shapes = (packed, (channels, 1, *kernel), (channels,), packed)
    return [random_tensor(shape, dtype, layout) for shape in (*shapes, *shapes[:3])]


def derivatives(conv, inputs):
    """y, its three gradients and, given gradients of these, theirs in x, weight and grad."""
    x, weight, bias, grad = (t.detach().requires_grad_() for t in inputs[:4])
    y = conv(x, weight, bias)
    first = torch.autograd.grad(y, (x, weight, bias), grad, create_graph=True)
    second = torch.autograd.grad(first, (x, weight, grad), inputs[4:]) if inputs[4:] else ()
    return [t.detach() for t in (y, *first, *second)]


def check(mask, inputs, dilation=1):
    """Everything within the budget of `assert_within_budget`."""

    def exact(inputs):
        inputs = [t.double() for t in inputs]
        return derivatives(lambda *xs: oracle(*xs, mask, dilation), inputs)

    found = derivatives(
        lambda x, weight, bias: ck.masked_conv2d(
            x, weight, bias, mask, dilation=dilation, groups=x.shape[2], impl="triton"
        ),
        inputs,
    )
    plain = derivatives(lambda *xs: dense_masked_conv2d(*xs, mask, dilation), inputs)
    terms = exact([t.abs() for t in inputs])
    for values in zip(found, exact(inputs), plain, terms, NAMES):
        assert_within_budget(*values)


def test_triton_runs_here():
    assert "triton" in implementations()
    assert "interpreted on the CPU" in ck.info()["triton"]


# The interpreter is slow: every dtype meets every mask, and the layouts and edges go round.
@pytest.mark.parametrize(
    ("name", "dtype", "layout", "edge"),
    [
        (name, dtype, LAYOUTS[(i + j) % 4], EDGES[(i + 2 * j + i // 4) % 4])
        for i, name in enumerate(MASKS)
        for j, dtype in enumerate(DTYPES)
    ],
    ids=str,
)
@pytest.mark.thorough(but_every=17)
def test_masked_conv2d(name, dtype, layout, edge, few_programs):
    side, channels = edge
    few_programs(channels)
    mask = make_mask(name)
    inputs = make_inputs(mask, side, channels, (3, 3), dtype, layout)
    check(mask, inputs if layout == "contiguous" else inputs[:4])


@pytest.mark.parametrize(
    ("kernel", "side", "dilation"),
    [
        ((1, 1), 2, 1),
        ((5, 5), 4, 1),
        ((7, 7), 2, 1),
        ((15, 15), 1, 1),
        ((9, 3), 8, (1, 2)),
        ((1, 15), 2, (3, 2)),
        ((5, 1), 1, (2, 7)),
        ((3, 3), 16, (5, 17)),
        ((3, 1), 32, (33, 1)),
    ],
)
@pytest.mark.thorough(but_every=5)
def test_kernels_sides_and_dilations(kernel, side, dilation):
    mask = make_mask("ragged" if side < 8 else "corner")
    inputs = make_inputs(mask, side, 3, kernel)
    check(mask, inputs if side == 4 else inputs[:4], dilation)


def test_without_bias_and_with_some_gradients_only():
    mask = make_mask("ragged")
    x, weight, bias, grad, *_ = make_inputs(mask, 2, 5, (3, 5))
    everything = value_and_grads(
        lambda *xs: ck.masked_conv2d(*xs, mask, groups=5, impl="triton"), (x, weight, bias), grad
    )
    y = ck.masked_conv2d(x, weight, None, mask, groups=5, impl="triton")
    zero = ck.masked_conv2d(x, weight, 0 * bias, mask, groups=5, impl="triton")
    assert torch.equal(y, zero)
    for i in range(3):
        leaves = [t.detach().requires_grad_(i == j) for j, t in enumerate((x, weight, bias))]
        ck.masked_conv2d(*leaves, mask, groups=5, impl="triton").backward(grad)
        # all at once are summed in another order
        torch.testing.assert_close(leaves[i].grad, everything[1 + i])


def test_all_gradients_without_channels():
    x, weight = torch.zeros(3, 4, 0), torch.zeros(0, 1, 3, 3)
    table = make_mask("corner").neighbours(1)
    grads = grads_module.masked_conv2d_grads(x, x, weight, table, [1, 1])
    assert [g.shape for g in grads] == [x.shape, weight.shape, (0,)]


def with_nan_before(x):
    """A copy of packed features with a block of NaN before them: where a hidden one, -1, is."""
    return torch.cat([x.new_full((1, *x.shape[1:]), float("nan")), x])[1:]


@pytest.mark.parametrize(
    ("name", "dtype", "side", "channels", "kernel", "dilation", "layout"),
    [
        ("ragged", torch.float32, 2, 5, (3, 5), 1, "contiguous"),
        ("all", torch.bfloat16, 1, 7, (7, 7), 1, "sliced"),
        ("one", torch.float16, 4, 3, (5, 1), (2, 1), "transposed"),
        ("row", torch.float64, 1, 9, (1, 3), (1, 3), "channels_last"),
        ("corner", torch.float32, 1, 1, (15, 15), 1, "contiguous"),
        ("none", torch.float32, 2, 3, (3, 3), 1, "contiguous"),
    ],
    ids=str,
)
@pytest.mark.thorough(but_every=3)
def test_all_gradients_at_once(
    name, dtype, side, channels, kernel, dilation, layout, few_programs, monkeypatch
):
    few_programs(channels)
    monkeypatch.setattr(weight_grad_module, "MIN_POSITIONS_PER_PART", 40)  # the last one is ragged
    mask = make_mask(name)
    inputs = make_inputs(mask, side, channels, kernel, dtype, layout)[:4]
    steps = [dilation, dilation] if isinstance(dilation, int) else list(dilation)
    radius = max(reach([d * (k // 2)], side) for d, k in zip(steps, kernel))
    x, weight, _, grad = inputs
    if layout == "contiguous":
        x, grad = with_nan_before(x), with_nan_before(grad)
    table = mask.neighbours(radius)
    found = grads_module.masked_conv2d_grads(grad, x, weight, table, steps)

    def exact(inputs):
        inputs = [t.double() for t in inputs]
        return derivatives(lambda *xs: oracle(*xs, mask, dilation), inputs)[1:]

    plain = derivatives(lambda *xs: dense_masked_conv2d(*xs, mask, dilation), inputs)[1:]
    terms = exact([t.abs() for t in inputs])
    for values in zip(found, exact(inputs), plain, terms, NAMES[1:4], strict=True):
        assert_within_budget(*values)
        assert values[0].is_contiguous()
    *_, bias = weight_grad_module.masked_conv2d_weight_grad(grad, x, table, kernel, steps)
    assert torch.equal(found[2], bias)  # summed in the same order


@pytest.mark.parametrize(("i", "dtype"), list(enumerate(DTYPES)), ids=str)
@pytest.mark.thorough(but_every=5)
def test_strided_conv2d(i, dtype, few_programs):
    """Every shape in a dtype, and every dtype with two shapes."""
    few_programs(5)
    mask = make_mask("ragged")
    table = mask.neighbours(2)
    for shape in (SHAPES[i], SHAPES[i + 4]):
        tensors, rest = make_problem(mask, 5, shape, dtype)
        found = strided_results(torch.ops.convmae_triton, tensors, table, rest)
        check_results(found, tensors, table, rest)


HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64
ROWS = [
    # The shape, the dtypes of x, branch and vectors, the layout, whether the branch has a bias.
    ((3, 4, 33), (SINGLE, SINGLE, SINGLE), "sliced", True),
    ((9, 96), (HALF, HALF, SINGLE), "contiguous", True),
    ((5, 384), (SINGLE, torch.float16, SINGLE), "transposed", False),
    ((1, 1, 160), (HALF, HALF, HALF), "contiguous", False),
    ((2, 3, 7), (DOUBLE, DOUBLE, DOUBLE), "channels_last", True),
    ((41, 1), (torch.float16, torch.float16, torch.float16), "contiguous", True),
    ((0, 4, 5), (SINGLE, SINGLE, SINGLE), "contiguous", True),
]


@pytest.mark.parametrize(("shape", "kinds", "layout", "with_bias"), ROWS, ids=str)
def test_rows(shape, kinds, layout, with_bias, few_programs, monkeypatch):
    few_programs(shape[-1])
    for module in (add_layer_norm_grad, bias_gelu_grad):
        monkeypatch.setattr(module, "MIN_ROWS_PER_PART", 5)
    check_bias_gelu("triton", shape, kinds[1], kinds[2], layout)
    check_add_layer_norm("triton", shape, kinds, layout, with_bias)


@dtypes
@cases
@pytest.mark.thorough(but_every=23)
def test_gather_and_scatter(dtype, name, layout, side, channels, few_programs):
    few_programs(channels)
    mask = make_mask(name)
    dense = (mask.batch_size, channels, mask.grid[0] * side, mask.grid[1] * side)
    images = random_tensor(dense, dtype, layout)
    x = random_tensor((mask.num_visible, side * side, channels), dtype, layout)
    for op, value, grad in (
        (lambda impl, t: ck.gather_visible(t, mask, impl=impl), images, x),
        (lambda impl, t: ck.scatter_visible(t, mask, 0.1, impl=impl), x, images),
    ):
        found, expected = (
            value_and_grads(functools.partial(op, impl), [value], grad)
            for impl in ("triton", "reference")
        )
        for a, b in zip(found, expected, strict=True):
            order = torch.channels_last if a.dim() == 4 else torch.contiguous_format
            assert a.dtype == b.dtype
            assert a.is_contiguous(memory_format=order)
            assert torch.equal(a, b)


@pytest.mark.parametrize("side", [4, 8, 16, 32])
def test_gather_and_scatter_large_blocks(side):
    mask = make_mask("corner")
    images = random_tensor((1, 3, 2 * side, 2 * side), layout="transposed")
    packed = ck.gather_visible(images, mask, impl="triton")
    assert torch.equal(packed, ck.gather_visible(images, mask, impl="reference"))
    dense = ck.scatter_visible(packed, mask, impl="triton")
    assert torch.equal(dense, torch.where(mask.to_dense(side), images, 0))


HALOS = [(1, 1, 1, 1), (0, 0, 0, 0), (3, 2, 0, 5), (-1, 0, 2, -1), (-2, -1, 0, -3)]
WINDOWS = [
    # The shapes of windows; dtypes, layouts, channels and masks go round, large blocks are few.
    (DTYPES[k % 4], LAYOUTS[k // 2 % 4], name, side, channels, halo)
    for k, (side, halo, channels, name) in enumerate(
        (side, halo, (8, 7, 255, 1)[(i + j) % 4] if side < 8 else (1, 3)[j % 2], name)
        for i, (side, name) in enumerate(
            [(1, "ragged"), (2, "ragged"), (4, "equal"), (8, "corner"), (16, "corner")]
        )
        for j, halo in enumerate(HALOS)
        if min(halo) > -side and min(halo[0] + halo[1], halo[2] + halo[3]) > -side
    )
]


def bits(x):
    """What the elements of a tensor are in memory: NaN is NaN, and -0 is not 0."""
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


@pytest.mark.parametrize(("dtype", "layout", "name", "side", "channels", "halo"), WINDOWS, ids=str)
@pytest.mark.thorough(but_every=11)
def test_gather_windows(dtype, layout, name, side, channels, halo, few_programs):
    few_programs(channels)
    mask = make_mask(name)
    x = random_tensor((mask.num_visible, side * side, channels), dtype, layout)
    shape = reference.gather_windows(x, mask.neighbours(reach(halo, side)), halo, 0.0).shape
    # Small integers: their sums are exact in every dtype.
    grad = random_tensor(shape, dtype, layout).mul(2).round()
    found, expected = (
        value_and_grads(
            functools.partial(ck.gather_windows, mask=mask, halo=halo, fill=-1.5, impl=impl),
            [x],
            grad,
        )
        for impl in ("triton", "reference")
    )
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.is_contiguous()
        assert torch.equal(a, b)


@dtypes
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.thorough(but_every=11)
def test_windows_of_every_mask(dtype, name):
    mask, side, halo = make_mask(name), 2, (1, 3, 2, 0)
    table = mask.neighbours(2)
    grad = random_tensor((mask.num_visible, 6, 4, 3), dtype)
    x = torch.ops.convmae_triton.gather_windows_grad(grad, table, halo)
    if dtype == torch.bfloat16:  # to which the interpreter rounds towards zero
        exact = reference.gather_windows_grad(grad.double(), table, halo)
        error = (x - exact).abs()
        assert (error <= torch.finfo(dtype).eps * exact.abs() + 1e-6).all()
    else:  # the order of the sums shows
        assert torch.equal(x, reference.gather_windows_grad(grad, table, halo))
    windows = torch.ops.convmae_triton.gather_windows(x, table, halo, 0.1)
    assert torch.equal(windows, reference.gather_windows(x, table, halo, 0.1))
    assert x.shape[1] == side * side


@dtypes
@pytest.mark.parametrize("fill", [float("-inf"), float("nan"), -0.0])
@pytest.mark.thorough(but_every=11)
def test_what_hidden_positions_hold(dtype, fill):
    mask = make_mask("ragged")
    x = random_tensor((mask.num_visible, 4, 5), dtype)
    x[3, 1] = float("nan")
    x[4, 2] = -0.0
    found, expected = (
        ck.gather_windows(x, mask, (2, 3, 1, 1), fill, impl=impl)
        for impl in ("triton", "reference")
    )
    assert torch.equal(bits(found), bits(expected))


def test_a_nan_in_a_window_reaches_its_positions_only():
    mask, halo = make_mask("all"), (1, 0, 2, 1)
    spot = torch.zeros(mask.num_visible, 3, 5, 3)
    spot[17, 0, 1] = float("inf")  # what the window of an inner block holds of another
    spot[17, 1, 2] = float("nan")
    x = torch.ops.convmae_triton.gather_windows_grad(spot, mask.neighbours(1), halo)
    expected = reference.gather_windows_grad(spot, mask.neighbours(1), halo)
    assert int(x.isnan().sum()) == int(x.isinf().sum()) == 3
    assert torch.equal(bits(x), bits(expected))


@dtypes
@pytest.mark.parametrize("value", [float("nan"), -float("inf"), 1e30])
@pytest.mark.thorough(but_every=11)
def test_hidden_pixels_change_no_bit(dtype, value):
    mask, side = make_mask("ragged"), 2
    visible = mask.to_dense(side)
    images, grad = (random_tensor((4, 5, 6, 8), dtype) for _ in range(2))
    weight, bias = random_tensor((5, 1, 5, 5), dtype), random_tensor((5,), dtype)

    def through(images, weight, bias):
        x = ck.gather_visible(images, mask, impl="triton")
        y = ck.masked_conv2d(x, weight, bias, mask, groups=5, impl="triton")
        return ck.scatter_visible(y, mask, impl="triton")

    clean, dirty = (
        value_and_grads(
            through, [torch.where(visible, images, v), weight, bias], torch.where(visible, grad, v)
        )
        for v in (0.0, value)
    )
    for a, b in zip(clean, dirty, strict=True):
        assert b.isfinite().all()
        assert torch.equal(a, b)
    assert not dirty[1][~visible.expand_as(images)].any()


def test_a_nan_reaches_its_window_only():
    mask, side, kernel = make_mask("all"), 2, (3, 5)
    x, weight, bias, *_ = make_inputs(mask, side, 3, kernel)
    spot = torch.zeros(mask.num_visible, side * side, 1)
    spot[12, 1] = 1  # a corner of the second image
    window = ck.masked_conv2d(spot, torch.ones(1, 1, *kernel), None, mask, impl="reference") > 0
    dirty = torch.where(spot > 0, float("nan"), x)
    y = ck.masked_conv2d(dirty, weight, bias, mask, groups=3, impl="triton")
    assert torch.equal(y.isnan(), window.expand_as(y))


@pytest.mark.parametrize(("batch", "channels"), [(0, 3), (2, 0)])
def test_nothing_to_do(batch, channels):
    mask = ck.BlockMask.full(batch, (3, 4))
    images = torch.zeros(batch, channels, 6, 8)
    packed = ck.gather_visible(images, mask, impl="triton")
    assert packed.shape == (batch * 12, 4, channels)
    assert ck.scatter_visible(packed, mask, impl="triton").shape == images.shape
    windows, grad = value_and_grads(
        lambda x: ck.gather_windows(x, mask, (1, 0, -1, 2), impl="triton"),
        [packed],
        torch.zeros(batch * 12, 3, 3, channels),
    )
    assert windows.shape == (batch * 12, 3, 3, channels)
    assert grad.shape == packed.shape
    if channels > 0:
        *_, grad_weight, grad_bias = derivatives(
            lambda *xs: ck.masked_conv2d(*xs, mask, groups=channels, impl="triton"),
            make_inputs(mask, 2, channels, (3, 3)),
        )[:4]
        assert grad_weight.shape == (channels, 1, 3, 3)
        assert not grad_weight.any()
        assert not grad_bias.any()
