"""Up-sampling and the convolution behind it, composed into one, against the pair."""

from functools import partial

import pytest
import torch
from torch.nn.functional import conv2d, conv_transpose2d
from torch.utils.flop_counter import FlopCounterMode

from convmae.models.cnn import merged_up_sampling
from convmae.models.cnn.merged_up_sampling import (
    compose,
    merged_up_sample_and_convolve,
    merging_pays,
    pair_macs,
    plain_up_sample_and_convolve,
    up_sample_and_convolve,
)
from convmae_kernels.ops.support import arithmetic
from convmae_kernels.testing import LAYOUTS, assert_within_budget, random_tensor, value_and_grads

pytestmark = pytest.mark.usefixtures("poisoned_empty")

IN, MID, OUT = 5, 6, 7
SIZES = [(1, 1), (1, 4), (3, 1), (2, 2), (5, 3), (7, 8)]
NAMES = ("output", "x", "up_weight", "up_bias", "conv_weight")
both_ways = pytest.mark.parametrize(
    "function", [merged_up_sample_and_convolve, plain_up_sample_and_convolve]
)


def pair(x, up_weight, up_bias, conv_weight):
    return conv2d(conv_transpose2d(x, up_weight, up_bias, 2, padding=1), conv_weight, padding=1)


def operands(size, dtype=torch.float64, channels=(IN, MID, OUT), batch=2, layout="channels_last"):
    """Map, first weight, bias and second weight, and a gradient of the result."""
    inside, mid, out = channels
    return (
        random_tensor((batch, inside, *size), dtype, layout),
        random_tensor((inside, mid, 4, 4), dtype) / (4 * inside) ** 0.5,
        random_tensor((mid,), dtype),
        random_tensor((out, mid, 3, 3), dtype) / (9 * mid) ** 0.5,
    ), random_tensor((batch, out, 2 * size[0], 2 * size[1]), dtype)


# -- values ---------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients(size, function):
    inputs, grad = operands(size)
    found, expected = (value_and_grads(f, inputs, grad) for f in (function, pair))
    for what, a, b in zip(NAMES, found, expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda m, w=what: f"{w}: {m}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_and_no_bias(layout):
    (x, up_weight, _, conv_weight), grad = operands((3, 4), layout=layout)
    y = merged_up_sample_and_convolve(x, up_weight, None, conv_weight)
    assert y.is_contiguous(memory_format=torch.channels_last)
    expected = pair(x, up_weight, None, conv_weight)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_without_images():
    inputs, grad = operands((3, 4), batch=0)
    y, *grads = value_and_grads(merged_up_sample_and_convolve, inputs, grad)
    assert y.shape == (0, OUT, 6, 8)
    assert all((g == 0).all() for g in grads)


def test_the_kernel_is_the_pairs():
    """Away from the border the merged convolution is a transposed one by this kernel."""
    (x, up_weight, _, conv_weight), _ = operands((6, 6))
    six = conv2d(up_weight, conv_weight, padding=2)
    expected = conv_transpose2d(x, six, None, 2, padding=2)
    groups = conv2d(x, compose(up_weight, conv_weight), padding=1).unflatten(1, (2, 2, OUT))
    for row in (0, 1):
        for column in (0, 1):
            torch.testing.assert_close(groups[:, row, column], expected[:, :, row::2, column::2])


def test_derivatives_by_finite_differences():
    inputs, _ = operands((2, 1), channels=(2, 1, 2), batch=1)
    leaves = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(merged_up_sample_and_convolve, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(merged_up_sample_and_convolve, leaves, fast_mode=True)


# -- arithmetic -----------------------------------------------------------------------------------


@pytest.mark.parametrize("slow", [True, False], ids=["multiplied wider", "multiplied as it is"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_are_those_of_the_pair(dtype, slow, monkeypatch):
    half = frozenset({torch.bfloat16, torch.float16})
    monkeypatch.setattr(arithmetic, "SLOW_ON_CPU", half if slow else frozenset())
    inputs, grad = operands((5, 6), dtype, channels=(16, 16, 8))
    results = [
        value_and_grads(function, arguments, g)
        for function, arguments, g in (
            (merged_up_sample_and_convolve, inputs, grad),
            (pair, [x.double() for x in inputs], grad.double()),
            (pair, inputs, grad),
            (pair, [x.double().abs() for x in inputs], grad.double().abs()),
        )
    ]
    for name, found, exact, plain, terms in zip(NAMES, *results):
        assert_within_budget(found, exact, plain, terms, name)


@pytest.mark.parametrize("slow", [True, False], ids=["multiplied wider", "multiplied as it is"])
@both_ways
def test_autocast(function, slow, monkeypatch):
    half = frozenset({torch.bfloat16, torch.float16})
    monkeypatch.setattr(arithmetic, "SLOW_ON_CPU", half if slow else frozenset())
    inputs, grad = operands((4, 3), torch.float32)
    leaves = [x.requires_grad_() for x in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        y = function(*leaves)
    found = [y.detach(), *torch.autograd.grad(y, leaves, grad.bfloat16())]
    assert found[0].dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in found[1:])
    expected = value_and_grads(function, [x.bfloat16() for x in inputs], grad.bfloat16())
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=0, atol=0)


@pytest.mark.thorough
def test_compiled_whole():
    inputs, grad = operands((3, 4))
    compiled = torch.compile(merged_up_sample_and_convolve, backend="aot_eager", fullgraph=True)
    found = value_and_grads(compiled, inputs, grad)
    for a, b in zip(found, value_and_grads(pair, inputs, grad)):
        torch.testing.assert_close(a, b)


# -- what it costs, and which way is taken --------------------------------------------------------


def count(function):
    with FlopCounterMode(display=False) as counter:
        result = function()
    return counter.get_total_flops(), result


def test_operations_are_as_counted():
    """But for the sum over the bias, and the padding of the ring's second convolution."""
    size, channels = (6, 9), (8, 8, 8)
    inputs, grad = operands(size, channels=channels, batch=3)
    leaves = [x.requires_grad_() for x in inputs]
    counted = pair_macs(3, *size, *channels)
    for macs, function in zip(
        counted, (plain_up_sample_and_convolve, merged_up_sample_and_convolve)
    ):
        forward, y = count(partial(function, *leaves))
        backward, _ = count(lambda y=y: torch.autograd.grad(y, leaves, grad))
        assert forward == pytest.approx(2 * macs, rel=0.02)
        assert backward == pytest.approx(4 * macs, rel=0.02)


def test_the_rule_follows_batch_size_and_channels():
    # SparK's decoder of width 768 at 224 pixels
    levels = [(768, 7), (384, 14), (192, 28), (96, 56), (48, 112)]
    pays = {
        batch: [merging_pays(batch, side, side, c, c, c) for c, side in levels]
        for batch in (1, 4, 64, 1024)
    }
    assert pays[1] == [False, False, False, True, True]
    assert pays[4] == [False, False, True, True, True]
    assert pays[64] == [False, True, True, True, True]
    assert pays[1024] == [True, True, True, True, True]
    assert not merging_pays(1024, 64, 64, 768, 8, 768)  # a narrow middle: the pair is the cheap way


@pytest.mark.parametrize("merged", [True, False])
def test_both_ways_are_taken(merged, monkeypatch):
    inputs, grad = operands((4, 4))
    monkeypatch.setattr(merged_up_sampling, "merging_pays", lambda *sizes: merged)
    taken = merged_up_sample_and_convolve if merged else plain_up_sample_and_convolve
    y = up_sample_and_convolve(*inputs)
    torch.testing.assert_close(y, taken(*inputs), rtol=0, atol=0)
    assert count(partial(up_sample_and_convolve, *inputs))[0] == count(partial(taken, *inputs))[0]


def test_the_up_sampled_map_is_not_kept():
    inputs, _ = operands((32, 32), torch.float32, channels=(8, 8, 8), batch=4)
    kept = {}

    def note(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    leaves = [x.requires_grad_() for x in inputs]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        y = merged_up_sample_and_convolve(*leaves)
    assert sum(kept.values()) < inputs[0].nbytes + y.nbytes // 2


# -- what does not fit ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "shape", "message"),
    [
        (0, (2, IN, 4), r"x must be \[B, C_in, H, W\]"),
        (1, (IN + 1, MID, 4, 4), r"up_weight must be \[5, C_mid, 4, 4\]"),
        (1, (IN, MID, 2, 2), r"up_weight must be \[5, C_mid, 4, 4\]"),
        (2, (MID + 1,), r"up_bias must be \[6\]"),
        (3, (OUT, MID + 1, 3, 3), r"conv_weight must be \[C_out, 6, 3, 3\]"),
        (3, (OUT, MID, 1, 1), r"conv_weight must be \[C_out, 6, 3, 3\]"),
    ],
)
def test_wrong_shapes(place, shape, message):
    inputs = list(operands((3, 3))[0])
    inputs[place] = random_tensor(shape, torch.float64)
    for function in (
        up_sample_and_convolve,
        merged_up_sample_and_convolve,
        plain_up_sample_and_convolve,
    ):
        with pytest.raises(ValueError, match=message):
            function(*inputs)
