"""Convolutions of any channels, groups, stride and padding, against PyTorch's on dense maps."""

from types import SimpleNamespace

import pytest
import torch

import convmae_kernels as ck
from convmae_kernels.ops import window_conv2d
from convmae_kernels.ops.support import arithmetic, conv_plan, dispatch, geometry
from convmae_kernels.ops.support.conv_plan import plan_conv2d
from convmae_kernels.ops.support.dispatch import WHY_NOT_COMPILED, why_not
from convmae_kernels.testing import (
    DTYPES,
    LAYOUTS,
    assert_within_budget,
    make_mask,
    random_tensor,
    value_and_grads,
)
from tests.support.conv_results import NAMES, check_close
from tests.support.convolutions import (
    CASES,
    ONE_OF_EACH,
    Case,
    convolve,
    convolve_dense,
    every_case,
    impls_of,
    make_inputs,
    mask_for,
    run,
    run_dense,
    with_impls,
)

pytestmark = [pytest.mark.usefixtures("poisoned_empty"), pytest.mark.thorough(but_every=3)]

HALF = (torch.bfloat16, torch.float16)
NAN = float("nan")


# -- values -------------------------------------------------------------------------------------


@every_case
def test_every_path_is_taken(case):
    mask = mask_for(case)
    *arguments, _ = make_inputs(case, mask, torch.float32)
    with torch.autograd.profiler.profile() as profile:
        convolve(case, mask, *arguments)
    names = {event.name for event in profile.function_events}
    if "convmae::masked_conv2d" in names:
        path = "depthwise"
    elif "convmae::strided_conv2d" in names:
        path = "strided"
    elif "convmae::window_conv2d" not in names:
        path = "linear"
    elif "convmae::grouped_conv2d" in names or (case.groups > 1 and WHY_NOT_COMPILED):
        path = "groups"
    else:
        path = "convolution" if "aten::conv2d" in names else "product"
    assert path == case.path


WAYS = {
    "linear": "product",
    "depthwise": "depthwise",
    "strided": "strided",
    "groups": "groups",
    "product": "windows, product",
    "convolution": "windows, convolution",
}


@every_case
def test_the_plan_says_which_path_is_taken(case):
    (c_in, c_out), groups = case.channels, case.groups
    shape = (c_out, c_in // groups, *case.kernel)
    plan = plan_conv2d(case.side, shape, case.stride, case.padding, case.dilation, groups)
    assert plan.way == WAYS[case.path]
    assert plan.has_kernels == (case.path != "linear")
    assert plan.description
    assert plan.stride**2 * plan.sampled == case.stride**2


@pytest.mark.parametrize("impl", ["cpu", "cuda", "triton"])
@pytest.mark.parametrize("case", [CASES[i] for i in (1, 2, 3)], ids=str)
def test_a_name_without_kernels_is_refused(case, impl, monkeypatch):
    mask = mask_for(case)
    *arguments, _ = make_inputs(case, mask)
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "why_not", lambda impl, x: None)  # as if all of them could run here
        with pytest.raises(RuntimeError) as error:
            convolve(case, mask, *arguments, impl=impl)
    assert str(error.value) == (
        f"impl='{impl}' cannot run: with kernel {case.kernel}, stride {case.stride}, padding "
        "(0, 0) and groups=1 the convolution is one matrix product of packed features, which "
        "PyTorch computes; expected impl='auto' or 'reference'"
    )
    if why_not(impl, arguments[0]) is not None:
        with pytest.raises(RuntimeError, match=f"impl='{impl}' cannot run: "):
            convolve(case, mask, *arguments, impl=impl)
    with pytest.raises(RuntimeError, match="impl='numpy' cannot run: it is not one of 'auto'"):
        convolve(case, mask, *arguments, impl="numpy")


@pytest.mark.parametrize(
    ("impl", "device", "dtype", "channels", "groups", "expected"),
    [
        ("auto", "cuda", torch.bfloat16, 16, 1, True),
        ("auto", "cuda", torch.bfloat16, 15, 1, False),
        ("auto", "cuda", torch.float32, 16, 2, True),
        ("auto", "cuda", torch.float32, 16, 1, False),
        ("auto", "cuda", torch.float64, 16, 2, False),
        ("auto", "cpu", torch.bfloat16, 16, 1, False),
        ("cuda", "cuda", torch.bfloat16, 16, 2, False),
        ("triton", "cuda", torch.float32, 16, 1, True),
        ("triton", "cuda", torch.float64, 16, 1, False),
    ],
    ids=str,
)
def test_where_triton_takes_the_place_of_windows(
    impl, device, dtype, channels, groups, expected, monkeypatch
):
    x = SimpleNamespace(dtype=dtype, device=torch.device(device))
    for outputs, inputs in ((16, channels), (channels, 16)):
        weight = torch.zeros(groups * outputs, inputs, 3, 3)
        for why_not_triton in (None, "triton is not installed"):
            monkeypatch.setattr(window_conv2d, "WHY_NOT_TRITON", why_not_triton)
            found = window_conv2d.goes_without_windows(impl, x, weight, groups)
            assert found == (expected and (impl == "triton" or why_not_triton is None))


def without_grouped_kernels(monkeypatch):
    """Groups are computed as on a GPU."""
    monkeypatch.setattr(window_conv2d, "_has_grouped_kernels", lambda ops, x, groups: False)


@pytest.mark.parametrize("case", [case for case in CASES if case.path == "groups"], ids=str)
def test_groups_as_on_a_gpu(case, monkeypatch):
    without_grouped_kernels(monkeypatch)
    mask = mask_for(case)
    inputs = make_inputs(case, mask)
    with torch.autograd.profiler.profile() as profile:
        found = run(case, mask, inputs)
    names = {event.name for event in profile.function_events}
    assert "convmae::gather_windows" in names
    assert "convmae::grouped_conv2d" not in names
    check_close(found, run_dense(case, mask, inputs))


@pytest.mark.parametrize("case", [CASES[i] for i in (10, 14, 18, 19, 22, 25, 27)], ids=str)
@pytest.mark.parametrize("shift", [(1, -1, 0, 0), (0, 0, -1, 1)], ids=["down", "left"])
def test_a_wrong_halo_shows(case, shift, monkeypatch):
    """The oracle has a geometry of its own: a mistake in that of the ops is on one side only."""
    mask = mask_for(case)
    *arguments, _ = make_inputs(case, mask)
    dense = convolve_dense(case, mask, *arguments)
    without_grouped_kernels(monkeypatch)  # which look at no halo
    torch.testing.assert_close(convolve(case, mask, *arguments), dense)
    right = geometry.window_halo

    def wrong(*sizes):
        return tuple(map(sum, zip(right(*sizes), shift, strict=True)))

    for module in (geometry, conv_plan):
        monkeypatch.setattr(module, "window_halo", wrong)
    oracle = convolve(case, mask, *arguments, impl="reference")
    torch.testing.assert_close(oracle, dense)
    difference = convolve(case, mask, *arguments) - oracle
    assert difference.abs().max() > 0.01 * dense.abs().max()


@pytest.mark.parametrize("case", [CASES[i] for i in (6, 10, 14, 22, 27)], ids=str)
def test_neighbours_that_are_too_few_show(case, monkeypatch):
    mask = mask_for(case)
    *arguments, _ = make_inputs(case, mask)
    monkeypatch.setattr(conv_plan, "reach", lambda halo, side: 0)
    with pytest.raises(ValueError, match="reach beyond the neighbours, which are 1 x 1 blocks"):
        convolve(case, mask, *arguments, impl="reference")


@every_case
@pytest.mark.parametrize("name", ["ragged", "none", "all"])
def test_values_and_gradients(case, name):
    mask = mask_for(case, name)
    inputs = make_inputs(case, mask)
    expected = run_dense(case, mask, inputs)
    for impl in impls_of(case):
        check_close(run(case, mask, inputs, impl), expected)


@every_case
def test_every_dtype(case):
    mask = mask_for(case)
    for dtype in DTYPES:
        inputs = make_inputs(case, mask, dtype)
        exact = run_dense(case, mask, [x.double() for x in inputs])
        terms = run_dense(case, mask, [x.double().abs() for x in inputs])
        plain = run_dense(case, mask, inputs)
        for impl in impls_of(case):
            found = run(case, mask, inputs, impl)
            names = [f"{dtype} {name} of impl={impl!r}" for name in NAMES]
            for values in zip(found, exact, plain, terms, names, strict=True):
                assert_within_budget(*values)


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(case, layout):
    mask = mask_for(case)
    inputs = make_inputs(case, mask, layout=layout)
    before = [x.clone() for x in inputs]
    found = run(case, mask, inputs)
    check_close(found, run_dense(case, mask, inputs))
    assert found[0].is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@with_impls(ONE_OF_EACH)
def test_without_bias_and_only_some_gradients(case, impl):
    mask = mask_for(case, "equal")
    x, weight, bias, grad = make_inputs(case, mask)
    expected = run(case, mask, [x, weight, torch.zeros_like(bias), grad], impl)
    for needed in ((True, False), (False, True), (True, True)):
        leaves = [t.detach().requires_grad_(n) for t, n in zip((x, weight), needed, strict=True)]
        y = convolve(case, mask, *leaves, None, impl=impl)
        y.backward(grad)
        assert (leaves[0].grad is not None, leaves[1].grad is not None) == needed
        found = [
            y.detach(),
            *(e if t.grad is None else t.grad for t, e in zip(leaves, expected[1:])),
        ]
        check_close([*found, expected[3]], expected)


@with_impls(ONE_OF_EACH)
def test_no_images(case, impl):
    mask = ck.BlockMask.full(0, (3, 4))
    inputs = make_inputs(case, mask)
    y, grad_x, grad_weight, grad_bias = run(case, mask, inputs, impl)
    assert (y.shape, grad_x.shape) == (inputs[3].shape, inputs[0].shape)
    assert not grad_weight.any()
    assert not grad_bias.any()


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_hidden_pixels_change_no_bit(case):
    mask = mask_for(case, "ragged")
    batch, (gh, gw), (c_in, c_out) = mask.batch_size, mask.grid, case.channels
    out = case.side // case.stride
    images = random_tensor((batch, c_in, gh * case.side, gw * case.side))
    grad = random_tensor((batch, c_out, gh * out, gw * out))
    _, weight, bias, _ = make_inputs(case, mask, torch.float32)

    def through(images, weight, bias):
        y = convolve(case, mask, ck.gather_visible(images, mask), weight, bias)
        return ck.scatter_visible(y, mask)

    clean, dirty = (
        value_and_grads(
            through,
            [torch.where(mask.to_dense(case.side), images, value), weight, bias],
            torch.where(mask.to_dense(out), grad, value),
        )
        for value in (0.0, NAN)
    )
    for a, b in zip(clean, dirty, strict=True):
        assert b.isfinite().all()
        assert torch.equal(a, b)
    assert dirty[1].any()
    assert not dirty[1][~mask.to_dense(case.side).expand_as(images)].any()


# -- derivatives and registration ---------------------------------------------------------------

SMALL = [
    Case("product", 2, (2, 1), (3, 1), dilation=(1, 2)),
    Case("product", 4, (1, 2), (4, 2), stride=2),
    Case("groups", 2, (2, 4), (3, 3), groups=2),
    Case("groups", 4, (2, 2), (4, 2), stride=2, groups=2),
    Case("linear", 2, (2, 1), (2, 2), stride=2),
    Case("strided", 2, (2, 2), (3, 3), stride=2, groups=2),
]


@with_impls(SMALL)
def test_derivatives_of_every_order(case, impl):
    mask = make_mask("row")
    inputs = [x.requires_grad_() for x in make_inputs(case, mask)[:3]]

    def conv(*xs):
        return convolve(case, mask, *xs, impl=impl)

    assert torch.autograd.gradcheck(conv, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(conv, inputs, fast_mode=True)
    for i in range(3):  # each one alone: other formulas are skipped then
        alone = [x.detach().requires_grad_(i == j) for j, x in enumerate(inputs)]
        assert torch.autograd.gradgradcheck(lambda *xs: conv(*xs).sin(), alone, fast_mode=True)


def test_derivatives_of_the_op_off_its_centre():
    # The op takes any padding; the gradient in x then looks the other way.
    mask = make_mask("row")
    inputs = [
        random_tensor(shape, torch.float64).requires_grad_()
        for shape in ((mask.num_visible, 4, 2), (1, 2, 2, 3), (1,))
    ]

    def op(*xs):
        return torch.ops.convmae.window_conv2d(*xs, mask.neighbours(1), 1, [0, 2], [1, 1], 1)

    assert torch.autograd.gradcheck(op, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(op, inputs, fast_mode=True)


@pytest.mark.parametrize("case", SMALL[:4], ids=str)
def test_registration(case):
    mask = make_mask("row")
    inputs = [x.requires_grad_() for x in make_inputs(case, mask, torch.float32)[:3]]
    options = (mask.neighbours(1), case.stride, case.numbers, case.dilation, case.groups)
    torch.library.opcheck(torch.ops.convmae.window_conv2d.default, (*inputs, *options))
    without = (*(x.detach().bfloat16() for x in inputs[:2]), None)
    torch.library.opcheck(torch.ops.convmae.window_conv2d.default, (*without, *options))


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_meta_tensors_give_shapes(case):
    mask = mask_for(case).to("meta")
    *arguments, grad = [x.to("meta") for x in make_inputs(case, mask_for(case))]
    arguments = [x.requires_grad_() for x in arguments]
    y = convolve(case, mask, *arguments)
    assert (y.shape, y.device.type) == (grad.shape, "meta")
    grads = torch.autograd.grad(y, arguments, grad)
    assert [g.shape for g in grads] == [x.shape for x in arguments]


def test_func_transforms():
    case = Case("product", 4, (2, 3), (3, 3), stride=2)
    mask = make_mask("equal")
    *arguments, _ = make_inputs(case, mask)
    found = torch.func.grad(
        lambda *xs: convolve(case, mask, *xs).square().sum(), argnums=(0, 1, 2)
    )(*arguments)
    y = convolve_dense(case, mask, *arguments)
    expected = run_dense(case, mask, [*arguments, 2 * y])[1:]
    torch.testing.assert_close(list(found), expected)


def test_one_compiled_callable_serves_every_mask():
    grid = (3, 4)
    weights = [
        random_tensor(shape).requires_grad_()
        for shape in ((6, 3, 4, 4), (6, 6, 3, 3), (6, 3, 3, 3), (6, 5, 2, 2))
    ]

    def model(images, mask):
        x = ck.gather_visible(images, mask)
        x = ck.masked_conv2d(x, weights[0], None, mask, stride=2, padding=1).relu()
        x = ck.masked_conv2d(x, weights[1], None, mask).relu()
        x = ck.masked_conv2d(x, weights[2], None, mask, groups=2)
        return ck.scatter_visible(ck.masked_conv_transpose2d(x, weights[3], None, mask, 2), mask)

    torch._dynamo.reset()
    function = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            mask = ck.BlockMask.random(2, grid, 0.5)
            images = random_tensor((2, 3, 24, 32))
            grad = random_tensor((2, 5, 24, 32))
            results = [
                (y := f(images, mask), *torch.autograd.grad(y, weights, grad))
                for f in (function, model)
            ]
            torch.testing.assert_close(*results)


# -- number types -------------------------------------------------------------------------------


@with_impls(ONE_OF_EACH)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast(case, dtype, impl):
    mask = mask_for(case)
    inputs = make_inputs(case, mask, torch.float32)
    inputs[3] = inputs[3].to(dtype)
    exact = run_dense(case, mask, [x.double() for x in inputs])
    terms = run_dense(case, mask, [x.double().abs() for x in inputs])
    with torch.autocast("cpu", dtype):
        found = run(case, mask, inputs, impl)
        plain = run_dense(case, mask, inputs)
        mixed = convolve(case, mask, inputs[0].to(dtype), *inputs[1:3], impl=impl)
    assert found[0].dtype == mixed.dtype == dtype
    assert [g.dtype for g in found[1:]] == [torch.float32] * 3
    # What is rounded to a half type within plain autocast counts as its error.
    for values in zip(found, exact, plain, terms, NAMES, strict=True):
        assert_within_budget(*values)
    assert_within_budget(mixed, exact[0], plain[0], terms[0])


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_autocast_leaves_float64_alone(case):
    mask = mask_for(case)
    x, weight, bias, _ = make_inputs(case, mask)
    weight, bias = weight.float(), bias.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = convolve(case, mask, x, weight, bias)
    assert y.dtype == torch.float64
    assert torch.equal(y, convolve(case, mask, x, weight.double(), bias.double()))


NOT_DEPTHWISE = [case for case in ONE_OF_EACH if case.path != "depthwise"]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", NOT_DEPTHWISE, ids=str)
def test_slow_half_types_are_multiplied_in_float32(case, dtype, monkeypatch):
    mask = mask_for(case)
    inputs = make_inputs(case, mask, dtype)
    wide = run(case, mask, [x.float() for x in inputs])
    exact = run_dense(case, mask, [x.double() for x in inputs])
    terms = run_dense(case, mask, [x.double().abs() for x in inputs])
    plain = run_dense(case, mask, inputs)
    monkeypatch.setattr(arithmetic, "SLOW_ON_CPU", frozenset(HALF))
    assert arithmetic.product_dtype(inputs[0]) == torch.float32
    slow = run(case, mask, inputs)
    for i in (0, 2, 3):  # one rounding, of what float32 gives
        assert torch.equal(slow[i], wide[i].to(dtype)), NAMES[i]
    monkeypatch.setattr(arithmetic, "SLOW_ON_CPU", frozenset())
    assert arithmetic.product_dtype(inputs[0]) == dtype
    fast = run(case, mask, inputs)
    for found in (slow, fast):
        for values in zip(found, exact, plain, terms, NAMES, strict=True):
            assert_within_budget(*values)


# -- bad input ----------------------------------------------------------------------------------

MASK = make_mask("equal")  # 2 images, 3 x 4 blocks, 8 of them visible
X, WEIGHT, BIAS = torch.zeros(8, 16, 4), torch.zeros(6, 4, 3, 3), torch.zeros(6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": X.int()}, TypeError, "x must be float32, .*got torch.int32"),
        ({"x": X[:7]}, ValueError, "x has 7 blocks, but the mask has 8 visible ones"),
        ({"x": X[:, :9]}, ValueError, r"got s\*s = 9"),
        ({"x": X[..., :3]}, ValueError, "x has 3 channels, but weight .* takes 4"),
        ({"weight": WEIGHT[0]}, ValueError, r"weight must be \[C_out, .*got \[4, 3, 3\]"),
        ({"weight": WEIGHT.half()}, TypeError, "weight is torch.float16, but x is torch.float32"),
        ({"bias": BIAS[:4]}, ValueError, r"bias must be \[6\], got \[4\]"),
        ({"bias": BIAS.double()}, TypeError, "bias is torch.float64, but x is torch.float32"),
        ({"groups": 2}, ValueError, "x has 4 channels, but weight .* with groups=2 takes 8"),
        ({"groups": 0}, ValueError, "groups must be a positive integer, got 0"),
        ({"groups": -4}, ValueError, "groups must be a positive integer, got -4"),
        ({"groups": None}, ValueError, "groups must be a positive integer, got None"),
        (
            {"groups": 4, "weight": WEIGHT[:, :1]},
            ValueError,
            "groups=4 does not divide the 6 channels of weight",
        ),
        ({"stride": 3}, ValueError, "stride must be a power of two, .* 4 here, got 3"),
        ({"stride": 8}, ValueError, "stride must .* divides the side of the blocks, 4 here, got 8"),
        ({"stride": (2, 1)}, ValueError, r"stride must .* same in both directions, .* \(2, 1\)"),
        ({"stride": 1.5}, ValueError, "stride must be a positive integer or a pair .* got 1.5"),
        ({"stride": None}, ValueError, "stride must be a positive integer or a pair .* got None"),
        ({"dilation": (2, "1")}, ValueError, r"dilation must be a positive .* got \(2, '1'\)"),
        ({"padding": "full"}, ValueError, 'padding must be "same", "valid" or .* got \'full\''),
        ({"padding": -1}, ValueError, "padding must be a non-negative integer .* got -1"),
        ({"padding": None}, ValueError, "padding must be a non-negative integer .* got None"),
        ({"padding": (1, 1, 1)}, ValueError, r"padding must be a non-.* got \(1, 1, 1\)"),
        ({"padding": 2}, ValueError, r"padding must keep .* kernel \(3, 3\), .* \[1\], got 2"),
        ({"padding": "valid"}, ValueError, r"padding must keep .* one of \[1\], got 'valid'"),
        (
            {"weight": torch.zeros(6, 4, 3, 7), "padding": 1},
            ValueError,
            r"padding must keep .* one of \[1\] in rows and one of \[3\] in columns, got 1",
        ),
        (
            {"weight": torch.zeros(6, 4, 5, 5), "padding": 3, "stride": 4},
            ValueError,
            r"padding must keep .* stride 4 .* one of \[1, 2\], got 3",
        ),
        (
            {"weight": torch.zeros(6, 4, 2, 2)},
            ValueError,
            r"padding must keep .* kernel \(2, 2\), stride 1 .* impossible, got 'same'",
        ),
        ({"impl": "numpy"}, RuntimeError, "impl='numpy' cannot run: it is not one of 'auto'"),
    ],
)
def test_rejects(arguments, error, message):
    good = {"x": X, "weight": WEIGHT, "bias": BIAS, "mask": MASK}
    assert ck.masked_conv2d(**good).shape == (8, 16, 6)
    with pytest.raises(error, match=message):
        ck.masked_conv2d(**{**good, **arguments})
