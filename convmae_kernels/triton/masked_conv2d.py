"""`masked_conv2d` in Triton: the kernel of `strided_conv2d` with stride 1."""

from torch import Tensor

from convmae_kernels.triton import tuning
from convmae_kernels.triton.strided_conv2d import describe, sum_taps
from convmae_kernels.triton.tuning import Configuration

CONFIGURATIONS = (
    Configuration("square", {"POSITIONS": 16, "CHANNELS": 64}, num_warps=4),
    Configuration("wide", {"POSITIONS": 8, "CHANNELS": 128}, num_warps=4),
    Configuration("large", {"POSITIONS": 64, "CHANNELS": 64}, num_warps=8),
    Configuration("small", {"POSITIONS": 16, "CHANNELS": 32}, num_warps=2),
    Configuration("tall", {"POSITIONS": 128, "CHANNELS": 8}, num_warps=4),
)


def launch(
    configuration: Configuration,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    neighbours: Tensor,
    dilation: list[int],
) -> tuple[Tensor]:
    """Runs one configuration; the same as `masked_conv2d`."""
    padding = [step * (side // 2) for step, side in zip(dilation, weight.shape[2:], strict=True)]
    return (sum_taps(configuration, x, weight, bias, neighbours, 1, padding, dilation),)


def masked_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor, dilation: list[int]
) -> Tensor:
    """Depthwise convolution of packed features, see `reference.masked_conv2d`."""
    problem = describe(x, weight.shape[2:])
    arguments = (x, weight, bias, neighbours, dilation)
    (y,) = tuning.run("masked_conv2d", problem, CONFIGURATIONS, launch, arguments)
    return y
