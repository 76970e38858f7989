"""GELU of what a product gives, with the bias that the product left out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from convmae_kernels.ops import reference
from convmae_kernels.ops.support.derivatives import derivatives_of_function
from convmae_kernels.ops.support.dispatch import Impl, register
from convmae_kernels.ops.support.rows import check_rows, check_vector, choose, eager_calls

if TYPE_CHECKING:
    from torch import Tensor


def _fake(x, bias):
    return x.new_empty(x.shape)


def _fake_grad(grad, x, bias):
    return x.new_empty(x.shape), bias.new_empty(bias.shape)


def _derivatives(ops):
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    def backward(ctx, grad):
        return ops.bias_gelu_grad(grad, *ctx.saved_tensors)

    return backward, setup_context


register("bias_gelu(Tensor x, Tensor bias) -> Tensor", reference.bias_gelu, _fake, _derivatives)
register(
    "bias_gelu_grad(Tensor grad, Tensor x, Tensor bias) -> (Tensor, Tensor)",
    reference.bias_gelu_grad,
    _fake_grad,
    derivatives_of_function(reference.bias_gelu_grad),
)
_EAGER = eager_calls("bias_gelu", _derivatives)


def bias_gelu(x: Tensor, bias: Tensor, *, impl: Impl = "auto") -> Tensor:
    """`torch.nn.functional.gelu(x + bias)`, computed in float32 and rounded once.

    Backward, one kernel reads `x` and the gradient, writes that of `x` and sums that of the bias,
    for which PyTorch would read it once more.

    Args:
        x: float32, bfloat16, float16 or float64 `[..., C]`, such as a product without its bias.
        bias: `[C]`, of any of these dtypes; its gradient has the same.
        impl: which implementation runs: "reference", "triton", or "auto": Triton's on a GPU.

    Returns:
        `[..., C]`, contiguous, in the dtype of `x`. Differentiable any number of times. Of Triton's
        kernels the same input gives the same bits.

    Raises:
        TypeError: an argument is not a tensor of one of the dtypes.
        ValueError: shapes or devices do not fit.
        RuntimeError: `impl` was named and cannot run.
    """
    check_rows("x", x)
    check_vector("bias", bias, x)
    return choose(impl, "bias_gelu", reference.bias_gelu, _EAGER, x)(x, bias)
