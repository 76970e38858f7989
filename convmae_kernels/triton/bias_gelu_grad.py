"""`bias_gelu_grad` in Triton: the gradient in x, sums of parts of it for the bias, then their sum.

No sum depends on the configuration: the number of parts is the problem's, in a part each of
`LANES` sums takes every `LANES`-th row in order, and lanes and parts are added up pairwise.
"""

import triton
import triton.language as tl
from torch import Tensor

from convmae_kernels.triton import tuning
from convmae_kernels.triton.accumulation import (
    accumulator,
    add_parts,
    empty_parts,
    pairwise_sum,
    parts_of,
)
from convmae_kernels.triton.bias_gelu import normal_distribution
from convmae_kernels.triton.tuning import Configuration

LANES = 8
# Parts are made until there are so many programs of `CHANNELS_OF_PART`, or their rows are so few.
ENOUGH_PROGRAMS, CHANNELS_OF_PART, MIN_ROWS_PER_PART = 1024, 256, 64

CONFIGURATIONS = (
    Configuration("narrow", {"CHANNELS": 128}, num_warps=4),
    Configuration("square", {"CHANNELS": 256}, num_warps=4),
    Configuration("wide", {"CHANNELS": 512}, num_warps=8),
)


@triton.jit(do_not_specialize=["rows", "rows_per_part"])
def bias_gelu_grad_kernel(
    grad_ptr,  # [rows, C]
    x_ptr,  # [rows, C]
    bias_ptr,  # [C]
    grad_x_ptr,  # [rows, C]
    parts_ptr,  # [parts, C]
    rows,
    rows_per_part,
    channels,
    ACCUMULATOR: tl.constexpr,
    LANES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    tiles = tl.cdiv(channels, CHANNELS)
    pid = tl.program_id(0)
    channel = (pid % tiles) * CHANNELS + tl.arange(0, CHANNELS)
    part = (pid // tiles).to(tl.int64)
    real = channel < channels
    bias = tl.load(bias_ptr + channel, mask=real, other=0).to(ACCUMULATOR)
    first = part * rows_per_part
    last = tl.minimum(first + rows_per_part, rows)
    sums = tl.zeros([LANES, CHANNELS], ACCUMULATOR)
    for start in range(first, last, LANES):
        row = start + tl.arange(0, LANES)
        mask = (row < last)[:, None] & real[None, :]
        place = row[:, None] * channels + channel[None, :]
        grad = tl.load(grad_ptr + place, mask=mask, other=0).to(ACCUMULATOR)
        z = tl.load(x_ptr + place, mask=mask, other=0).to(ACCUMULATOR) + bias[None, :]
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        grad *= normal_distribution(z) + z * density
        tl.store(grad_x_ptr + place, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)
        sums += grad
    total = tl.reshape(pairwise_sum(sums, 1, LANES, CHANNELS), (CHANNELS,))
    tl.store(parts_ptr + part * channels + channel, total, mask=real)


def split(rows: int, channels: int) -> tuple[int, int]:
    """The rows of a part, and how many parts there are."""
    tiles = -(-max(channels, 1) // CHANNELS_OF_PART)
    return parts_of(rows, MIN_ROWS_PER_PART, -(-ENOUGH_PROGRAMS // tiles))


def launch(
    configuration: Configuration, grad: Tensor, x: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Runs one configuration; the same as `bias_gelu_grad`."""
    grad_x, channels = x.new_empty(x.shape), x.shape[-1]
    rows = grad_x.numel() // max(channels, 1)
    per_part, parts = split(rows, channels)
    sums = empty_parts(grad_x.view(rows, channels), parts, 1)
    if sums.numel() > 0:
        programs = configuration.grid(CHANNELS=channels)[0] * parts
        bias_gelu_grad_kernel[(programs,)](
            grad.contiguous(),
            x.contiguous(),
            bias.contiguous(),
            grad_x,
            sums,
            rows,
            per_part,
            channels,
            ACCUMULATOR=accumulator(x.dtype),
            LANES=LANES,
            **configuration.options,
        )
    (grad_bias,) = add_parts(sums, bias.dtype)
    return grad_x, grad_bias


def bias_gelu_grad(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients in x and bias, see `reference.bias_gelu_grad`."""
    problem = f"{x.shape[-1]} channels, {x.dtype}, {bias.dtype}"
    return tuning.run("bias_gelu_grad", problem, CONFIGURATIONS, launch, (grad, x, bias))
