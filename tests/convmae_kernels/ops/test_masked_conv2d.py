"""`masked_conv2d` and its gradients, against float64 and against a dense convolution."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import convmae_kernels as ck
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
from convmae_kernels.zorder import BLOCK_SIZES
from tests.support.instruction_sets import LOWER, run_tests

pytestmark = [pytest.mark.usefixtures("poisoned_empty"), pytest.mark.thorough(but_every=3)]

all_impls = pytest.mark.parametrize("impl", implementations())
NAMES = ("output", "gradient of x", "gradient of weight", "gradient of bias")
KERNELS = [(k, k) for k in range(1, 16, 2)] + [(1, 5), (7, 3), (15, 1), (5, 11)]
INF, NAN = float("inf"), float("nan")


def make_inputs(mask, side, channels, kernel, dtype=torch.float32, layout="contiguous"):
    """x, weight, bias and the gradient of the output."""
    packed = (mask.num_visible, side * side, channels)
    shapes = (packed, (channels, 1, *kernel), (channels,), packed)
    return [random_tensor(shape, dtype, layout) for shape in shapes]


def run(impl, mask, inputs, dilation=1):
    """The output and its three gradients."""
    *arguments, grad = inputs
    return value_and_grads(
        lambda x, weight, bias: ck.masked_conv2d(
            x, weight, bias, mask, dilation=dilation, groups=x.shape[2], impl=impl
        ),
        arguments,
        grad,
    )


def run_exact(mask, inputs, dilation=1):
    """The same in float64 by the reference."""
    *arguments, grad = [x.double() for x in inputs]
    return value_and_grads(lambda *xs: oracle(*xs, mask, dilation), arguments, grad)


def run_dense(mask, inputs, dilation=1):
    """The same by `torch.nn.functional.conv2d` on `where(visible, x, 0)`."""
    *arguments, grad = inputs
    return value_and_grads(lambda *xs: dense_masked_conv2d(*xs, mask, dilation), arguments, grad)


def check(mask, inputs, dilation=1):
    """Output and gradients of every implementation against the oracle, within the budget."""
    exact = run_exact(mask, inputs, dilation)
    terms = run_exact(mask, [x.abs() for x in inputs], dilation)
    dense = run_dense(mask, inputs, dilation)
    for impl in implementations():
        results = run(impl, mask, inputs, dilation)
        names = [f"{name} of impl={impl!r}" for name in NAMES]
        for values in zip(results, exact, dense, terms, names, strict=True):
            assert_within_budget(*values)


# -- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", BLOCK_SIZES)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_the_oracle_is_a_dense_convolution(kernel, side):
    mask = make_mask("ragged" if side < 16 else "corner")
    inputs = make_inputs(mask, side, 2, kernel, torch.float64)
    for dilation in (1, 2, (3, 2)):
        exact, dense = run_exact(mask, inputs, dilation), run_dense(mask, inputs, dilation)
        for a, b, name in zip(exact, dense, NAMES, strict=True):
            torch.testing.assert_close(
                a,
                b,
                rtol=1e-12,
                atol=1e-12 * b.abs().max().item(),
                msg=lambda m, n=name: f"{n}: {m}",
            )


@pytest.mark.parametrize("side", BLOCK_SIZES)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_every_side_and_kernel(kernel, side):
    mask = make_mask("ragged" if side < 16 else "corner")
    for dilation in (1, (2, 3)):
        check(mask, make_inputs(mask, side, 9, kernel), dilation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MASKS)
def test_every_dtype_layout_and_edge(dtype, layout, name):
    mask = make_mask(name)
    for side, channels in ((1, 255), (2, 7), (4, 1), (4, 8)):
        check(mask, make_inputs(mask, side, channels, (5, 5), dtype, layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130])
def test_every_vector_width_and_its_remainder(dtype, channels):
    mask = make_mask("ragged")
    for side, kernel in ((2, (3, 3)), (4, (7, 7))):
        check(mask, make_inputs(mask, side, channels, kernel, dtype))


@pytest.mark.skipif("cpu" not in implementations(), reason="the compiled library is not there")
@pytest.mark.parametrize(("level", "name"), LOWER)
@pytest.mark.thorough
def test_lower_instruction_sets(level, name):
    """The kernels for other machines, as far as this one can run them."""
    run_tests(__file__, "test_every_vector_width or test_values_reach", level, name)


def test_gradient_of_a_sum():
    # The gradient of a sum is one number, expanded: every stride is 0.
    mask = make_mask("ragged")
    x, weight, bias, grad = make_inputs(mask, 4, 9, (5, 5))
    ones = torch.ones(()).expand_as(grad)
    check(mask, [x, weight, bias, ones])


@all_impls
@pytest.mark.parametrize("needed", range(1, 8))
def test_only_some_gradients(impl, needed):
    mask = make_mask("ragged")
    *inputs, grad = make_inputs(mask, 4, 5, (3, 3))
    expected = run(impl, mask, [*inputs, grad])
    leaves = [x.requires_grad_(bool(needed >> i & 1)) for i, x in enumerate(inputs)]
    y = ck.masked_conv2d(*leaves, mask, groups=5, impl=impl)
    y.backward(grad)
    for leaf, value in zip(leaves, expected[1:], strict=True):
        assert (leaf.grad is not None) == leaf.requires_grad
        assert leaf.grad is None or torch.equal(leaf.grad, value)


@pytest.mark.skipif("cpu" not in implementations(), reason="the compiled library is not there")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_apart_have_the_same_bits(dtype):
    """Tiles of 4 x 4, in blocks of one or several, of 2 x 2, none; few and many channels."""
    ops, dilation = torch.ops.convmae, [1, 1]
    mask = make_mask("ragged")
    for side, channels, k in ((4, 37, 5), (8, 16, 7), (2, 24, 7), (2, 3, 3), (1, 16, 3)):
        x, weight, _, grad = make_inputs(mask, side, channels, (k, k), dtype)
        table = mask.neighbours(-(-(k // 2) // side))
        together = ops.masked_conv2d_grads(grad, x, weight, table, dilation)
        grad_x = ops.masked_conv2d(grad, weight.flip(2, 3), None, table, dilation)
        apart = grad_x, *ops.masked_conv2d_weight_grad(grad, x, table, [k, k], dilation)
        for a, b in zip(together, apart, strict=True):
            assert torch.equal(a, b), (side, channels, k)


@all_impls
def test_without_bias(impl):
    mask = make_mask("ragged")
    x, weight, bias, _ = make_inputs(mask, 4, 9, (5, 5))
    y = ck.masked_conv2d(x, weight, None, mask, groups=9, impl=impl)
    zero = ck.masked_conv2d(x, weight, torch.zeros_like(bias), mask, groups=9, impl=impl)
    assert torch.equal(y, zero)


@st.composite
def problems(draw):
    odd = st.integers(0, 7).map(lambda n: 2 * n + 1)
    visible = draw(
        st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)).flatmap(
            lambda shape: st.lists(
                st.booleans(), min_size=shape[0] * shape[1] * shape[2], max_size=48
            ).map(lambda v: torch.tensor(v[: shape[0] * shape[1] * shape[2]]).view(shape))
        )
    )
    return {
        "mask": ck.BlockMask.from_visible(visible),
        "side": draw(st.sampled_from(BLOCK_SIZES[:4])),
        "channels": draw(st.integers(1, 40)),
        "kernel": (draw(odd), draw(odd)),
        "dilation": (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        "dtype": draw(st.sampled_from(DTYPES)),
        "layout": draw(st.sampled_from(LAYOUTS)),
    }


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problem=problems())
def test_random_problems(problem):
    mask, dilation = problem.pop("mask"), problem.pop("dilation")
    torch.manual_seed(0)
    check(mask, make_inputs(mask, **problem), dilation)


# -- exact cases --------------------------------------------------------------------------------


@all_impls
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", [(3, 3), (5, 3), (9, 9)], ids=str)
def test_one_tap_is_a_shift(impl, dtype, kernel):
    mask, side = make_mask("ragged"), 2
    x = random_tensor((mask.num_visible, side * side, 3), dtype)
    dense = ck.scatter_visible(x, mask, impl="reference")
    reach = max(kernel) // 2
    padded = torch.nn.functional.pad(dense, (reach,) * 4)
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            weight = torch.zeros(3, 1, *kernel, dtype=dtype)
            weight[:, :, i, j] = 1
            top, left = reach + i - kernel[0] // 2, reach + j - kernel[1] // 2
            shifted = padded[:, :, top : top + dense.shape[2], left : left + dense.shape[3]]
            expected = ck.gather_visible(shifted, mask, impl="reference")
            y = ck.masked_conv2d(x, weight, None, mask, groups=3, impl=impl)
            assert torch.equal(y, expected), f"tap {i}, {j}"


@all_impls
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_ones_count_the_visible_neighbours(impl, dtype, name):
    mask, side = make_mask(name), 2
    visible = mask.to_dense(side)
    ones = torch.ones(mask.num_visible, side * side, 5, dtype=dtype)
    y = ck.masked_conv2d(
        ones,
        torch.ones(5, 1, 5, 3, dtype=dtype),
        ones[0, 0] * 2 if len(ones) else None,
        mask,
        groups=5,
        impl=impl,
    )
    expected = torch.zeros(mask.num_visible, side * side, dtype=dtype)
    packed = ck.gather_visible(
        torch.arange(visible.numel()).view(visible.shape).double(), mask, impl="reference"
    )
    height, width = visible.shape[2:]
    for t, z in torch.cartesian_prod(torch.arange(len(ones)), torch.arange(side**2)).tolist():
        index = int(packed[t, z, 0])
        image, row, column = index // (height * width), index // width % height, index % width
        window = visible[image, 0, max(row - 2, 0) : row + 3, max(column - 1, 0) : column + 2]
        expected[t, z] = 2 + window.sum()
    assert torch.equal(y, expected.unsqueeze(2).expand_as(y))


@pytest.mark.parametrize("impl", sorted({*implementations(), "auto"}))
def test_derivatives_of_every_order(impl):
    transforms = impl in (
        "auto",
        "reference",
    )  # others refuse them: tests/convmae_kernels/test_transforms.py
    mask = make_mask("equal")
    inputs = [x.requires_grad_() for x in make_inputs(mask, 2, 2, (3, 1), torch.float64)[:3]]

    def conv(x, weight, bias):
        return ck.masked_conv2d(x, weight, bias, mask, dilation=(1, 2), groups=2, impl=impl)

    assert torch.autograd.gradcheck(
        conv, inputs, check_forward_ad=transforms, check_batched_grad=transforms
    )
    assert torch.autograd.gradgradcheck(conv, inputs)
    for i in range(3):  # each one alone: other formulas are skipped then
        alone = [x.detach().requires_grad_(i == j) for j, x in enumerate(inputs)]
        assert torch.autograd.gradgradcheck(lambda *xs: conv(*xs).sin(), alone)


@pytest.mark.parametrize("bias_only", [False, True])
def test_derivatives_of_the_weight_gradient(bias_only):
    mask = make_mask("equal")
    x, _, _, grad = make_inputs(mask, 2, 2, (3, 5), torch.float64)

    def weight_grad(grad, x):
        results = torch.ops.convmae.masked_conv2d_weight_grad(
            grad, x, mask.neighbours(1), [3, 5], [1, 1]
        )
        return results[1] if bias_only else results

    inputs = (grad.requires_grad_(), x.requires_grad_(not bias_only))
    assert torch.autograd.gradcheck(weight_grad, inputs)
    assert torch.autograd.gradgradcheck(weight_grad, inputs)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_derivatives_of_both_gradients(wanted):
    mask = make_mask("corner")
    x, weight, _, grad = make_inputs(mask, 2, 2, (3, 5), torch.float64)

    def grads(*inputs):
        table = mask.neighbours(1)
        results = torch.ops.convmae.masked_conv2d_grads(*inputs, table, [1, 1])
        return tuple(results[i] for i in wanted)

    inputs = [t.requires_grad_() for t in (grad, x, weight)]
    assert torch.autograd.gradcheck(grads, inputs)
    assert torch.autograd.gradgradcheck(grads, inputs)


# -- hidden means hidden ------------------------------------------------------------------------


@all_impls
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e30])
def test_values_reach_their_window_only(impl, dtype, value):
    """A huge value at one visible position changes no bit outside its window, forward or back."""
    mask, side, kernel = make_mask("ragged"), 2, (3, 5)
    x, weight, bias, grad = make_inputs(mask, side, 3, kernel, dtype)
    clean = run(impl, mask, [x, weight, bias, grad])
    for block, z in ((0, 0), (5, 3), (12, 1), (mask.num_visible - 1, 2)):
        spot = torch.zeros(mask.num_visible, side * side, 1)
        spot[block, z] = 1
        window = ck.masked_conv2d(spot, torch.ones(1, 1, *kernel), None, mask, impl="reference") > 0
        assert 0 < window.sum() < window.numel()
        dirty = [torch.where(spot > 0, value, t) for t in (x, grad)]
        y = run(impl, mask, [dirty[0], weight, bias, grad])[0]
        grad_x = run(impl, mask, [x, weight, bias, dirty[1]])[1]
        for found, before in ((y, clean[0]), (grad_x, clean[1])):
            changed = (found != before) | found.isnan()
            assert not changed[~window.expand_as(changed)].any()
            assert changed[window.expand_as(changed)].all()


@all_impls
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e30])
@pytest.mark.parametrize("kernel", [(3, 3), (7, 7)], ids=str)
def test_hidden_pixels_change_no_bit(impl, dtype, value, kernel):
    mask, side = make_mask("ragged"), 4
    visible = mask.to_dense(side)
    images = random_tensor((4, 5, 12, 16), dtype)
    weight, bias = random_tensor((5, 1, *kernel), dtype), random_tensor((5,), dtype)
    grad = random_tensor((4, 5, 12, 16), dtype)

    def through(images, weight, bias):
        x = ck.gather_visible(images, mask, impl=impl)
        y = ck.masked_conv2d(x, weight, bias, mask, groups=5, impl=impl)
        return ck.scatter_visible(y, mask, impl=impl)

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


@all_impls
@pytest.mark.parametrize("side", [1, 2, 4, 8])
def test_visible_neighbours_of_other_images_are_hidden_too(impl, side):
    # The last row of one image and the first of the next are neighbours in memory only.
    mask = make_mask("all")
    inputs = make_inputs(mask, side, 4, (15, 15))
    half = mask.num_visible // 2
    dirty = inputs[0].clone()
    dirty[half:] = NAN
    y, expected = run(impl, mask, [dirty, *inputs[1:]])[0], run(impl, mask, inputs)[0]
    assert torch.equal(y[:half], expected[:half])
    assert y[half:].isnan().all()


# -- images of a batch --------------------------------------------------------------------------


@all_impls
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_images_of_a_batch_are_independent(impl, dtype):
    """Permuted, or alone: the same bits."""
    mask = make_mask("ragged")
    counts = mask.visible.flatten(1).sum(1).tolist()
    x, weight, bias, grad = make_inputs(mask, 4, 19, (5, 5), dtype)
    y, grad_x, *_ = (part.split(counts) for part in run(impl, mask, [x, weight, bias, grad])[:2])
    xs, grads = x.split(counts), grad.split(counts)
    for order in ([2, 0, 3, 1], [0], [1], [2], [3]):
        other = ck.BlockMask.from_visible(mask.visible[order])
        inputs = [torch.cat([xs[i] for i in order]), weight, bias]
        found = run(impl, other, [*inputs, torch.cat([grads[i] for i in order])])
        assert torch.equal(found[0], torch.cat([y[i] for i in order]))
        assert torch.equal(found[1], torch.cat([grad_x[i] for i in order]))


@all_impls
def test_two_masks_interleaved(impl):
    masks = [make_mask("ragged"), make_mask("equal")]
    inputs = [make_inputs(mask, 4, 5, (5, 5)) for mask in masks]
    alone = [run(impl, mask, xs) for mask, xs in zip(masks, inputs, strict=True)]
    leaves = [[x.detach().requires_grad_() for x in xs[:3]] for xs in inputs]
    outputs = [
        ck.masked_conv2d(*xs, mask, groups=5, impl=impl)
        for mask, xs in zip(masks, leaves, strict=True)
    ]
    for i in (0, 1):
        grads = torch.autograd.grad(outputs[i], leaves[i], inputs[i][3])
        for a, b in zip((outputs[i], *grads), alone[i], strict=True):
            assert torch.equal(a, b)


@all_impls
def test_no_images(impl):
    mask = ck.BlockMask.full(0, (3, 4))
    y, grad_x, grad_weight, grad_bias = run(impl, mask, make_inputs(mask, 4, 5, (5, 5)))
    assert y.shape == grad_x.shape == (0, 16, 5)
    assert not grad_weight.any()
    assert not grad_bias.any()


@all_impls
def test_inputs_are_left_alone(impl):
    mask = make_mask("ragged")
    inputs = make_inputs(mask, 4, 5, (5, 5))
    before = [x.clone() for x in inputs]
    run(impl, mask, inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


# -- bad input ----------------------------------------------------------------------------------

MASK = make_mask("equal")  # 2 images, 3 x 4 blocks, 8 of them visible
X, WEIGHT, BIAS = torch.zeros(8, 4, 3), torch.zeros(3, 1, 3, 3), torch.zeros(3)


def convolve(x=X, weight=WEIGHT, bias=BIAS, mask=MASK, groups=3, **options):
    return ck.masked_conv2d(x, weight, bias, mask, groups=groups, **options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": X[0]}, ValueError, r"x must be packed features \[T, s\*s, C\], got 2 dimensions"),
        ({"x": X.int()}, TypeError, "x must be float32, .*got torch.int32"),
        ({"x": X.to("meta")}, ValueError, "x is on meta, but the mask is on cpu"),
        ({"x": X[:7]}, ValueError, "x has 7 blocks, but the mask has 8 visible ones"),
        ({"x": torch.zeros(8, 9, 3)}, ValueError, r"got s\*s = 9"),
        ({"x": None}, TypeError, "x must be a tensor, got NoneType"),
        ({"mask": MASK.visible}, TypeError, "mask must be a BlockMask, got Tensor"),
        ({"mask": make_mask("all")}, ValueError, "x has 8 blocks, but the mask has 24 visible"),
        ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
        (
            {"weight": WEIGHT[0]},
            ValueError,
            r"weight must be \[C_out, C_in / groups, kh, kw\] .*, got \[1, 3, 3\]",
        ),
        ({"weight": WEIGHT.double()}, TypeError, "weight is torch.float64, but x is torch.float32"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "weight is on meta, but x is on cpu"),
        (
            {"weight": torch.zeros(4, 1, 3, 3), "groups": 4},
            ValueError,
            "x has 3 channels, but weight",
        ),
        (
            {"weight": torch.zeros(3, 1, 4, 3)},
            ValueError,
            r"padding must keep .* kernel \(4, 3\), .* impossible, got 'same'",
        ),
        (
            {"weight": torch.zeros(3, 1, 3, 2)},
            ValueError,
            r"padding must keep .* kernel \(3, 2\), .* impossible, got 'same'",
        ),
        (
            {"weight": torch.zeros(3, 1, 0, 3)},
            ValueError,
            r"a kernel of at least 1 x 1, got \[3, 1, 0, 3\]",
        ),
        ({"bias": BIAS[:2]}, ValueError, r"bias must be \[3\], got \[2\]"),
        ({"bias": BIAS.half()}, TypeError, "bias is torch.float16, but x is torch.float32"),
        ({"bias": BIAS.to("meta")}, ValueError, "bias is on meta, but x is on cpu"),
        ({"bias": 0.0}, TypeError, "bias must be a tensor, got float"),
        ({"stride": 4}, ValueError, "stride .* divides the side of the blocks, 2 here, got 4"),
        ({"stride": (1, 2)}, ValueError, r"stride .* the same in both directions, .* \(1, 2\)"),
        ({"stride": 0}, ValueError, "stride must be a positive integer or a pair of them, got 0"),
        ({"dilation": 0}, ValueError, "dilation must be a positive integer or a pair"),
        ({"dilation": (1, -1)}, ValueError, r"dilation must be a positive .*got \(1, -1\)"),
        ({"dilation": (1, 1, 1)}, ValueError, "dilation must be a positive integer or a pair"),
        ({"impl": "cuda"}, RuntimeError, "impl='cuda' cannot run: .*GPU"),
        ({"impl": "triton"}, RuntimeError, "impl='triton' cannot run: .*GPU"),
        ({"impl": "numpy"}, RuntimeError, "impl='numpy' cannot run: it is not one of 'auto'"),
    ],
)
def test_rejects(arguments, error, message):
    assert convolve().shape == X.shape
    with pytest.raises(error, match=message):
        convolve(**arguments)


def test_the_compiled_kernels_run_on_cpu_tensors_only():
    mask = MASK.to("meta")
    with pytest.raises(RuntimeError, match="impl='cpu' cannot run: the tensor is on meta"):
        convolve(X.to("meta"), WEIGHT.to("meta"), None, mask, impl="cpu")
