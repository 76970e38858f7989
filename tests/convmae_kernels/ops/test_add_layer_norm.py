"""`add_layer_norm` without Triton: the reference, its derivatives, what is recorded of it."""

import pytest
import torch

from convmae_kernels.ops import add_layer_norm
from convmae_kernels.testing import random_tensor
from tests.support.rows import check_add_layer_norm

HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize(
    "dtypes",
    [(HALF, HALF, SINGLE), (SINGLE, torch.float16, SINGLE), (SINGLE,) * 3, (DOUBLE,) * 3],
    ids=str,
)
def test_values(impl, dtypes):
    check_add_layer_norm(impl, (3, 2, 33), dtypes, "sliced", with_bias=dtypes[0] == HALF)


def arguments(dtype=DOUBLE):
    shapes = ((3, 4), (3, 4), (4,), (4,), (4,))
    return [random_tensor(shape, dtype).requires_grad_() for shape in shapes]


def run(x, branch, weight, bias, branch_bias):
    return add_layer_norm(x, branch, weight, bias, 1e-3, branch_bias)


def test_derivatives():
    inputs = arguments()
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *xs: run(*xs)[1], inputs, fast_mode=True)
    detached = [t.detach() for t in inputs]
    _, tangents = torch.func.jvp(run, tuple(detached), tuple(detached))
    assert all(t.isfinite().all() and t.any() for t in tangents)


def test_a_derivative_does_not_go_through_another_argument():
    """Here the gradient of the norm is the total itself."""
    inputs = arguments()

    def penalty(function):
        total, normed = function(*inputs)
        (grad,) = torch.autograd.grad((normed * total).sum(), inputs[0], create_graph=True)
        return torch.autograd.grad(grad.sin().sum(), inputs)

    def plain(x, branch, weight, bias, branch_bias):
        total = x + branch + branch_bias
        return total, torch.nn.functional.layer_norm(total, (4,), weight, bias, 1e-3)

    torch.testing.assert_close(penalty(run), penalty(plain))


def test_one_of_two_results_is_enough():
    inputs = arguments()
    total, normed = run(*inputs)
    first = torch.autograd.grad(total.sum(), inputs, retain_graph=True, allow_unused=True)
    assert first[2] is None and first[3] is None
    assert all((g == n).all() for g, n in zip((*first[:2], first[4]), (1, 1, 3)))
    second = torch.autograd.grad(normed.sum(), inputs)
    torch.testing.assert_close(second[3], torch.full((4,), 3.0, dtype=DOUBLE))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({0: torch.zeros(4)}, ValueError, r"x must be \[..., C\]"),
        ({1: torch.zeros(2, 4)}, ValueError, r"branch must be \[3, 4\] like x, got \[2, 4\]"),
        ({1: torch.zeros(3, 4, device="meta")}, ValueError, "branch is on meta, but x is on cpu"),
        ({2: None}, TypeError, "weight must be a tensor, got NoneType"),
        ({4: torch.zeros(4).int()}, TypeError, "branch_bias must be float32.*int32"),
    ],
)
def test_wrong_arguments(changed, error, message):
    given = [changed.get(i, t.detach()) for i, t in enumerate(arguments())]
    with pytest.raises(error, match=message):
        run(*given)
