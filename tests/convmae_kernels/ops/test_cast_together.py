"""Parameters that are cast together under autocast."""

import threading

import pytest
import torch
from torch.nn.functional import linear

import convmae_kernels as ck
from convmae_kernels.ops.support import arithmetic
from convmae_kernels.ops.support.arithmetic import as_cast, cast_together, multiply

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def fast_halves(monkeypatch):
    monkeypatch.setattr(arithmetic, "SLOW_ON_CPU", frozenset())


def weights():
    torch.manual_seed(0)
    return [torch.randn(5, 4).requires_grad_(), torch.randn(5).requires_grad_()]


@pytest.mark.parametrize("dtype", HALVES)
def test_the_numbers_are_those_of_autocast(dtype):
    x, results = torch.randn(3, 4), []
    for together in (False, True):
        weight, bias = weights()
        with torch.autocast("cpu", dtype):
            if together:
                with cast_together([weight, bias], x):
                    y = multiply(linear, x, weight, bias) + multiply(linear, x, weight, bias)
            else:
                y = linear(x, weight, bias) + linear(x, weight, bias)
        y.float().square().sum().backward()
        assert weight.grad.dtype == bias.grad.dtype == torch.float32
        results.append((y, weight.grad, bias.grad))
    for plain, cast in zip(*results, strict=True):
        assert torch.equal(plain, cast)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_masked_convolution_uses_the_casts(dtype):
    mask = ck.BlockMask.random(2, (3, 3), 0.5)
    x = torch.randn(mask.num_visible, 4, 6)
    for groups, kernel in ((6, 3), (1, 2), (1, 3)):
        weight = torch.randn(6, 6 // groups, kernel, kernel, requires_grad=True)
        stride = 2 if kernel == 2 else 1
        with torch.autocast("cpu", dtype):
            expected = ck.masked_conv2d(x, weight, None, mask, stride, groups=groups)
            with cast_together([weight], x):
                assert as_cast(weight).dtype == dtype
                found = ck.masked_conv2d(x, weight, None, mask, stride, groups=groups)
        assert torch.equal(found, expected)
        found.float().sum().backward()
        assert weight.grad.isfinite().all()


def test_where_nothing_is_cast():
    weight, bias = weights()
    x = torch.randn(3, 4)
    with cast_together([weight], x):
        assert as_cast(weight) is weight  # no autocast
    with torch.autocast("cpu", torch.bfloat16):
        with cast_together([weight], x.double()):
            assert as_cast(weight) is weight
        wide = weight.detach().double()
        with cast_together([wide, weight], x):
            assert as_cast(wide) is wide and as_cast(weight).dtype == torch.bfloat16
            assert as_cast(bias) is bias
        assert as_cast(weight) is weight  # and nothing is left of it
        with pytest.raises(KeyError), cast_together([weight], x):
            raise KeyError
        assert as_cast(weight) is weight


def test_not_where_the_cpu_multiplies_in_float32(monkeypatch):
    monkeypatch.setattr(arithmetic, "SLOW_ON_CPU", frozenset([torch.bfloat16]))
    (weight, _), x = weights(), torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16), cast_together([weight], x):
        assert as_cast(weight) is weight


def test_an_inner_one_keeps_the_casts_of_an_outer_one():
    (weight, bias), x = weights(), torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16), cast_together([weight], x):
        outer = as_cast(weight)
        with cast_together([weight, bias], x):
            assert as_cast(weight) is outer and as_cast(bias).dtype == torch.bfloat16
        assert as_cast(weight) is outer and as_cast(bias) is bias


def test_a_parameter_that_is_not_used_has_no_gradient():
    (weight, bias), x = weights(), torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16), cast_together([weight, bias], x):
        multiply(linear, x, weight, None).float().sum().backward()
    assert weight.grad is not None and bias.grad is None


def test_gradients_can_be_differentiated_again():
    x, results = torch.randn(3, 4), []
    for together in (False, True):
        weight, bias = weights()
        cast = [weight, bias] if together else []
        with torch.autocast("cpu", torch.bfloat16), cast_together(cast, x):
            y = multiply(linear, x, weight, bias)
        first = torch.autograd.grad(y.float().pow(3).sum(), weight, create_graph=True)[0]
        results.append(torch.autograd.grad(first.square().sum(), (weight, bias)))
    for plain, cast in zip(*results, strict=True):
        torch.testing.assert_close(cast, plain)


def test_other_threads_have_their_own():
    (weight, _), x, seen = weights(), torch.randn(3, 4), []
    with torch.autocast("cpu", torch.bfloat16), cast_together([weight], x):
        thread = threading.Thread(target=lambda: seen.append(as_cast(weight)))
        thread.start()
        thread.join()
    assert seen == [weight] or seen[0] is weight


def test_transforms_see_the_parameters_themselves():
    (weight, _), x = weights(), torch.randn(3, 4)

    def loss(w):
        with torch.autocast("cpu", torch.bfloat16), cast_together([w], x):
            return multiply(linear, x, w, None).float().square().sum()

    expected = torch.autograd.grad(loss(weight), weight)[0]
    torch.testing.assert_close(
        torch.func.grad(loss)(weight.detach()), expected, rtol=1e-2, atol=1e-2
    )
