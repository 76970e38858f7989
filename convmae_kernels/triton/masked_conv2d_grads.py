"""`masked_conv2d_grads` in Triton: a convolution with the flipped weight, and its gradient."""

from torch import Tensor

from convmae_kernels.triton.masked_conv2d import masked_conv2d
from convmae_kernels.triton.masked_conv2d_weight_grad import masked_conv2d_weight_grad


def masked_conv2d_grads(
    grad: Tensor, x: Tensor, weight: Tensor, neighbours: Tensor, dilation: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in x, weight and bias, see `reference.masked_conv2d_grads`."""
    grad_x = masked_conv2d(grad, weight.flip(2, 3), None, neighbours, dilation)
    kernel = list(weight.shape[2:])
    return grad_x, *masked_conv2d_weight_grad(grad, x, neighbours, kernel, dilation)
