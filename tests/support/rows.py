"""Problems of the ops on rows, `bias_gelu` and `add_layer_norm`, and what PyTorch's ops give."""

import torch
from torch.nn.functional import gelu, layer_norm

from convmae_kernels.ops import add_layer_norm, bias_gelu
from convmae_kernels.testing import assert_within_budget, random_tensor

EPS = 1e-3
GELU_NAMES = ("y", "grad_x", "grad_bias")
NORM_NAMES = ("total", "normed", "grad_x", "grad_branch", "grad_weight", "grad_bias", "of branch")


def results(function, inputs, grads):
    """The results of a function, and the gradients of its inputs given those of its results."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    ys = function(*leaves)
    return [*(y.detach() for y in ys), *torch.autograd.grad(ys, leaves, grads)]


def check_bias_gelu(impl, shape, dtype, vectors, layout="contiguous", device="cpu"):
    """Value and gradients within the budget of `assert_within_budget`."""
    x, grad = (random_tensor(shape, dtype, layout, device) for _ in range(2))
    bias = random_tensor(shape[-1:], vectors, device=device)

    def ours(x, bias):
        return (bias_gelu(x, bias, impl=impl),)

    def plain(x, bias):
        return (gelu(x + bias.to(x.dtype)),)

    _check(ours, plain, (x, bias), (grad,), GELU_NAMES)


def check_add_layer_norm(impl, shape, dtypes, layout="contiguous", with_bias=True, device="cpu"):
    """Sum, norm and gradients within the budget; `dtypes` are those of x, branch and vectors."""
    of_x, of_branch, of_vectors = dtypes
    x, branch = (random_tensor(shape, dtype, layout, device) for dtype in (of_x, of_branch))
    vectors = [random_tensor(shape[-1:], of_vectors, device=device) for _ in range(3)]
    grads = [
        random_tensor(shape, dtype, layout, device)
        for dtype in (torch.promote_types(of_x, of_branch), of_branch)
    ]

    def ours(x, branch, weight, bias, branch_bias=None):
        return add_layer_norm(x, branch, weight, bias, EPS, branch_bias, impl=impl)

    def plain(x, branch, weight, bias, branch_bias=None):
        y = branch if branch_bias is None else branch + branch_bias.to(branch.dtype)
        total = x + y
        weight, bias = weight.to(total.dtype), bias.to(total.dtype)
        normed = layer_norm(total, total.shape[-1:], weight, bias, EPS)
        return total, normed.to(branch.dtype)

    inputs = (x, branch, *vectors[: 2 + with_bias])
    _check(ours, plain, inputs, grads, NORM_NAMES[: len(inputs) + 2])


def _check(ours, plain, inputs, grads, names):
    found, expected = (results(f, inputs, grads) for f in (ours, plain))
    wide, wide_grads = ([t.double() for t in ts] for ts in (inputs, grads))
    exact = results(plain, wide, wide_grads)
    terms = results(plain, [t.abs() for t in wide], [t.abs() for t in wide_grads])
    for y, right, by_pytorch, most, name in zip(found, exact, expected, terms, names, strict=True):
        assert y.is_contiguous(), name
        if y.dtype == torch.float64:  # PyTorch's own result is what is right, and rounds as much
            assert (y.dtype, y.shape) == (by_pytorch.dtype, by_pytorch.shape), name
            assert (y - right).norm() <= 1e-14 * (most.norm() + right.norm()), name
        else:
            assert_within_budget(y, right, by_pytorch, most, name)
