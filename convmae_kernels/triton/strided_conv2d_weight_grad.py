"""`strided_conv2d_weight_grad` in Triton: sums of parts of the outputs, then the sum of the parts.

No sum depends on the configuration: the number of parts is the problem's, in a part each of
`LANES` sums takes every `LANES`-th output in order, and lanes and parts are added up pairwise.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from convmae_kernels.triton import tuning
from convmae_kernels.triton.accumulation import accumulator, pairwise_sum
from convmae_kernels.triton.masked_conv2d_weight_grad import (
    ELEMENTS,
    PART_LANES,
    sum_parts_kernel,
)
from convmae_kernels.triton.strided_conv2d import describe
from convmae_kernels.triton.tuning import Configuration
from convmae_kernels.triton.zorder import compact, side_bits, spread

LANES = 4
MIN_OUTPUTS_PER_PART, MAX_PARTS = 128, 256

CONFIGURATIONS = (
    Configuration("square", {"TAPS": 16, "CHANNELS": 64}, num_warps=4),
    Configuration("few_taps", {"TAPS": 8, "CHANNELS": 64}, num_warps=4),
    Configuration("wide", {"TAPS": 16, "CHANNELS": 128}, num_warps=8),
    Configuration("narrow", {"TAPS": 16, "CHANNELS": 16}, num_warps=4),
)


@triton.jit(do_not_specialize=["positions", "positions_per_part"])
def sum_outputs_kernel(
    grad_ptr,  # [T, (s / stride) ** 2, C]
    x_ptr,  # [T, s*s, C]
    neighbours_ptr,  # int32 [T, (2 * RADIUS + 1) ** 2]
    parts_ptr,  # [parts, kh * kw + 1, C]
    positions,  # T * (s / stride) ** 2
    positions_per_part,
    channels,
    padding_rows,
    padding_columns,
    dilation_rows,
    dilation_columns,
    KERNEL_ROWS: tl.constexpr,
    KERNEL_COLUMNS: tl.constexpr,
    RADIUS: tl.constexpr,
    SIDE_BITS: tl.constexpr,
    STRIDE_BITS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    LANES: tl.constexpr,
    TAPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    ALL_TAPS: tl.constexpr = KERNEL_ROWS * KERNEL_COLUMNS
    SIDE: tl.constexpr = 1 << SIDE_BITS
    OUT_BITS: tl.constexpr = SIDE_BITS - STRIDE_BITS
    TABLE_SIDE: tl.constexpr = 2 * RADIUS + 1
    tap_tiles, channel_tiles = tl.cdiv(ALL_TAPS + 1, TAPS), tl.cdiv(channels, CHANNELS)
    pid = tl.program_id(0)
    tap = (pid % tap_tiles) * TAPS + tl.arange(0, TAPS)
    channel = (pid // tap_tiles % channel_tiles) * CHANNELS + tl.arange(0, CHANNELS)
    part = (pid // tap_tiles // channel_tiles).to(tl.int64)
    real = channel < channels
    down = tap // KERNEL_COLUMNS * dilation_rows + RADIUS * SIDE - padding_rows
    right = tap % KERNEL_COLUMNS * dilation_columns + RADIUS * SIDE - padding_columns

    sums = tl.zeros([TAPS, LANES, CHANNELS], ACCUMULATOR)
    first = part * positions_per_part
    last = tl.minimum(first + positions_per_part, positions)
    for start in range(first, last, LANES):
        position = start + tl.arange(0, LANES)
        inside = position < last
        grad = tl.load(
            grad_ptr + position[:, None] * channels + channel[None, :],
            mask=inside[:, None] & real[None, :],
            other=0,
        )
        rank = (position & ((1 << (2 * OUT_BITS)) - 1)).to(tl.int32)
        row = (compact(rank >> 1, OUT_BITS) << STRIDE_BITS)[None, :] + down[:, None]
        column = (compact(rank, OUT_BITS) << STRIDE_BITS)[None, :] + right[:, None]
        table_ptr = neighbours_ptr + (position >> (2 * OUT_BITS)) * (TABLE_SIDE * TABLE_SIDE)
        block = tl.load(  # [TAPS, LANES]
            table_ptr[None, :] + (row >> SIDE_BITS) * TABLE_SIDE + (column >> SIDE_BITS),
            mask=inside[None, :] & (tap < ALL_TAPS)[:, None],
            other=-1,
        )
        source = block.to(tl.int64) << (2 * SIDE_BITS)
        source += spread(row & (SIDE - 1), SIDE_BITS) << 1
        source += spread(column & (SIDE - 1), SIDE_BITS)
        x = tl.load(
            x_ptr + source[:, :, None] * channels + channel[None, None, :],
            mask=(block >= 0)[:, :, None] & real[None, None, :],
            other=0,
        ).to(ACCUMULATOR)
        x = tl.where((tap == ALL_TAPS)[:, None, None], 1.0, x)  # the last tap is the bias
        sums = tl.fma(x, grad.to(ACCUMULATOR)[None, :, :], sums)
    tl.store(
        parts_ptr + (part * (ALL_TAPS + 1) + tap[:, None]) * channels + channel[None, :],
        pairwise_sum(sums, TAPS, LANES, CHANNELS),
        mask=(tap <= ALL_TAPS)[:, None] & real[None, :],
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
    blocks, outputs, channels = grad.shape
    taps, positions = kernel[0] * kernel[1], blocks * outputs
    weight, bias = x.new_empty(channels, 1, *kernel), x.new_empty(channels)
    if channels == 0:
        return weight, bias
    per_part = max(MIN_OUTPUTS_PER_PART, triton.cdiv(positions, MAX_PARTS))
    parts = triton.cdiv(positions, per_part)
    dtype = accumulator(x.dtype)
    wide = torch.float64 if dtype == tl.float64 else torch.float32
    sums = x.new_empty(parts, taps + 1, channels, dtype=wide)
    if parts > 0:
        programs = configuration.grid(TAPS=taps + 1, CHANNELS=channels)[0] * parts
        sum_outputs_kernel[(programs,)](
            grad.contiguous(),
            x.contiguous(),
            neighbours.contiguous(),
            sums,
            positions,
            per_part,
            channels,
            *padding,
            *dilation,
            KERNEL_ROWS=kernel[0],
            KERNEL_COLUMNS=kernel[1],
            RADIUS=math.isqrt(neighbours.shape[1]) // 2,
            SIDE_BITS=side_bits(x.shape[1]),
            STRIDE_BITS=stride.bit_length() - 1,
            ACCUMULATOR=dtype,
            LANES=LANES,
            **configuration.options,
        )
    sum_parts_kernel[(triton.cdiv((taps + 1) * channels, ELEMENTS),)](
        sums,
        weight,
        bias,
        parts,
        channels,
        ALL_TAPS=taps,
        ACCUMULATOR=dtype,
        PART_LANES=PART_LANES,
        ELEMENTS=ELEMENTS,
    )
    return weight, bias


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
