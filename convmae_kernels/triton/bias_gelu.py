"""`bias_gelu` in Triton."""

import triton
import triton.language as tl
from torch import Tensor

from convmae_kernels.triton import tuning
from convmae_kernels.triton.accumulation import accumulator
from convmae_kernels.triton.tile import tile_of_program
from convmae_kernels.triton.tuning import Configuration

CONFIGURATIONS = (
    Configuration("wide", {"POSITIONS": 8, "CHANNELS": 128}, num_warps=4),
    Configuration("rows", {"POSITIONS": 4, "CHANNELS": 512}, num_warps=4),
    Configuration("large", {"POSITIONS": 8, "CHANNELS": 512}, num_warps=8),
)


@triton.jit
def normal_distribution(z):
    """The probability that a standard normal number is less than `z`."""
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit(do_not_specialize=["positions"])
def bias_gelu_kernel(
    x_ptr,  # [positions, C]
    bias_ptr,  # [C]
    y_ptr,  # [positions, C]
    positions,
    channels,
    ACCUMULATOR: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    position, channel = tile_of_program(channels, POSITIONS, CHANNELS)
    real = channel < channels
    mask = (position < positions)[:, None] & real[None, :]
    place = position[:, None] * channels + channel[None, :]
    bias = tl.load(bias_ptr + channel, mask=real, other=0).to(ACCUMULATOR)
    z = tl.load(x_ptr + place, mask=mask, other=0).to(ACCUMULATOR) + bias[None, :]
    y = z * normal_distribution(z)
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=mask)


def launch(configuration: Configuration, x: Tensor, bias: Tensor) -> tuple[Tensor]:
    """Runs one configuration; the same as `bias_gelu`."""
    y, channels = x.new_empty(x.shape), x.shape[-1]
    if y.numel() > 0:
        positions = y.numel() // channels
        bias_gelu_kernel[configuration.grid(POSITIONS=positions, CHANNELS=channels)](
            x.contiguous(),
            bias.contiguous(),
            y,
            positions,
            channels,
            ACCUMULATOR=accumulator(x.dtype),
            **configuration.options,
        )
    return (y,)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """`gelu(x + bias)`, see `reference.bias_gelu`."""
    problem = f"{x.shape[-1]} channels, {x.dtype}, {bias.dtype}"
    (y,) = tuning.run("bias_gelu", problem, CONFIGURATIONS, launch, (x, bias))
    return y
