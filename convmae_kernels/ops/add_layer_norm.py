"""The sum of a residual block, and the layer norm that reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from convmae_kernels.ops import reference
from convmae_kernels.ops.support.derivatives import derivatives_of_function
from convmae_kernels.ops.support.dispatch import Impl, register
from convmae_kernels.ops.support.rows import check_rows, check_vector, choose, eager_calls

if TYPE_CHECKING:
    from torch import Tensor


def _fake(x, branch, branch_bias, weight, bias, eps):
    dtype = torch.promote_types(x.dtype, branch.dtype)
    return x.new_empty(x.shape, dtype=dtype), branch.new_empty(x.shape)


def _fake_grad(grad_normed, grad_total, total, weight, eps, has_branch_bias):
    channels = weight.shape[0]
    sizes = (channels, channels, channels if has_branch_bias else 0)
    vectors = [weight.new_empty(size) for size in sizes]
    return total.new_empty(total.shape), *vectors


def _derivatives(ops):
    def setup_context(ctx, inputs, output):
        x, branch, branch_bias, weight, bias, ctx.eps = inputs
        ctx.dtypes = [None if t is None else t.dtype for t in (x, branch, branch_bias, bias)]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[0], weight)

    def backward(ctx, grad_total, grad_normed):
        if grad_total is None and grad_normed is None:
            return (None,) * 6
        total, weight = ctx.saved_tensors
        of_x, of_branch, of_branch_bias, of_bias = ctx.dtypes
        has_branch_bias = of_branch_bias is not None and ctx.needs_input_grad[2]
        if grad_normed is None:  # the norm is not used
            grad_x, grad_weight, grad_bias = grad_total, None, None
            grad_branch_bias = grad_x.flatten(0, -2).sum(0) if has_branch_bias else None
        else:
            grad_x, grad_weight, grad_bias, grad_branch_bias = ops.add_layer_norm_grad(
                grad_normed, grad_total, total, weight, ctx.eps, has_branch_bias
            )
            grad_bias = grad_bias.to(of_bias)
        return (
            grad_x.to(of_x),
            grad_x.to(of_branch),
            grad_branch_bias.to(of_branch_bias) if has_branch_bias else None,
            grad_weight,
            grad_bias,
            None,
        )

    return backward, setup_context


register(
    "add_layer_norm(Tensor x, Tensor branch, Tensor? branch_bias, Tensor weight, Tensor bias,"
    " float eps) -> (Tensor, Tensor)",
    reference.add_layer_norm,
    _fake,
    _derivatives,
)
register(
    "add_layer_norm_grad(Tensor grad_normed, Tensor? grad_total, Tensor total, Tensor weight,"
    " float eps, bool has_branch_bias) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.add_layer_norm_grad,
    _fake_grad,
    derivatives_of_function(reference.add_layer_norm_grad),
)
_EAGER = eager_calls("add_layer_norm", _derivatives)


def add_layer_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    branch_bias: Tensor | None = None,
    *,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """`total = x + branch + branch_bias`, and `layer_norm(total, (C,), weight, bias, eps)`.

    Everything is computed in float32, and the total and its norm are each rounded once. Forward,
    the total is not read again for its norm. Backward, one kernel reads the total and the gradients
    of both, and writes the one of `x` and `branch`; PyTorch adds two, and reads them again for the
    gradients of the vectors.

    Args:
        x: float32, bfloat16, float16 or float64 `[..., C]`, what flows past the block.
        branch: of the same shape, any of these dtypes.
        weight: `[C]` of the norm, of any of these dtypes.
        bias: `[C]`.
        eps: added to the variance.
        branch_bias: `[C]`, the bias of the product that `branch` is, if that left it out.
        impl: which implementation runs: "reference", "triton", or "auto": Triton's on a GPU.

    Returns:
        The total, in the dtype to which those of `x` and `branch` promote, and its norm, in the
        dtype of `branch`: under autocast that of the product which reads it. Both `[..., C]` and
        contiguous. Differentiable any number of times. Of Triton's kernels the same input gives the
        same bits.

    Raises:
        TypeError: an argument is not a tensor of one of the dtypes.
        ValueError: shapes or devices do not fit.
        RuntimeError: `impl` was named and cannot run.
    """
    check_rows("x", x)
    check_rows("branch", branch)
    if branch.shape != x.shape:
        raise ValueError(f"branch must be {list(x.shape)} like x, got {list(branch.shape)}")
    if branch.device != x.device:
        raise ValueError(f"branch is on {branch.device}, but x is on {x.device}")
    check_vector("weight", weight, x)
    check_vector("bias", bias, x)
    if branch_bias is not None:
        check_vector("branch_bias", branch_bias, x)
    run = choose(impl, "add_layer_norm", reference.add_layer_norm, _EAGER, x)
    return run(x, branch, branch_bias, weight, bias, float(eps))
