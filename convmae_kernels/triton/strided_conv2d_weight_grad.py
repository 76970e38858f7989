"""`strided_conv2d_weight_grad` in Triton: the kernels of `masked_conv2d_weight_grad`."""

from torch import Tensor

from convmae_kernels.triton import tuning
from convmae_kernels.triton.masked_conv2d_weight_grad import sum_positions
from convmae_kernels.triton.strided_conv2d import describe
from convmae_kernels.triton.tuning import Configuration

CONFIGURATIONS = (
    Configuration("square", {"TAPS": 16, "CHANNELS": 64}, num_warps=4),
    Configuration("few_taps", {"TAPS": 8, "CHANNELS": 64}, num_warps=4),
    Configuration("wide", {"TAPS": 16, "CHANNELS": 128}, num_warps=8),
    Configuration("narrow", {"TAPS": 16, "CHANNELS": 16}, num_warps=4),
)


def launch(
    configuration: Configuration,
    grad: Tensor,
    x: Tensor,
    neighbours: Tensor,
    kernel: list[int],
    stride: int,
    padding: list[int],
    dilation: list[int],
) -> tuple[Tensor, Tensor]:
    """Runs one configuration; the same as `strided_conv2d_weight_grad`."""
    return sum_positions(configuration, grad, x, neighbours, kernel, stride, padding, dilation)


def strided_conv2d_weight_grad(
    grad: Tensor,
    x: Tensor,
    neighbours: Tensor,
    kernel: list[int],
    stride: int,
    padding: list[int],
    dilation: list[int],
) -> tuple[Tensor, Tensor]:
    """Gradients in weight and bias, see `reference.strided_conv2d_weight_grad`."""
    problem = describe(x, kernel, stride)
    arguments = (grad, x, neighbours, kernel, stride, padding, dilation)
    return tuning.run("strided_conv2d_weight_grad", problem, CONFIGURATIONS, launch, arguments)
