"""`masked_conv2d_weight_grad` in Triton: sums of parts of the positions, then the sum of the parts.

No sum depends on the configuration: the number of parts is the problem's, in a part each of
`LANES` sums takes every `LANES`-th position in order, and lanes and parts are added up pairwise.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from convmae_kernels.triton import tuning
from convmae_kernels.triton.accumulation import (
    ELEMENTS,
    PART_LANES,
    accumulator,
    pairwise_sum,
    sum_of_parts,
)
from convmae_kernels.triton.strided_conv2d import describe
from convmae_kernels.triton.tile import position_in
from convmae_kernels.triton.tuning import Configuration
from convmae_kernels.triton.zorder import compact, side_bits

if TYPE_CHECKING:
    from collections.abc import Sequence

LANES = 4
MIN_POSITIONS_PER_PART, MAX_PARTS = 256, 256

CONFIGURATIONS = (
    Configuration("square", {"TAPS": 16, "CHANNELS": 64}, num_warps=4),
    Configuration("few_taps", {"TAPS": 8, "CHANNELS": 64}, num_warps=4),
    Configuration("many_taps", {"TAPS": 32, "CHANNELS": 64}, num_warps=8),
    Configuration("wide", {"TAPS": 16, "CHANNELS": 128}, num_warps=8),
    Configuration("narrow", {"TAPS": 16, "CHANNELS": 16}, num_warps=4),
)


@triton.jit(do_not_specialize=["positions", "positions_per_part"])
def sum_positions_kernel(
    grad_ptr,  # [T, (s / stride) ** 2, C]
    x_ptr,  # [T, s*s, C]
    neighbours_ptr,  # int32 [T, (2 * RADIUS + 1) ** 2]
    parts_ptr,  # [parts, kh * kw + 1, C]
    positions,  # T * (s / stride) ** 2
    positions_per_part,
    channels,
    dilation_rows,
    dilation_columns,
    PADDING_ROWS: tl.constexpr,
    PADDING_COLUMNS: tl.constexpr,
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
    down = tap // KERNEL_COLUMNS * dilation_rows + RADIUS * SIDE - PADDING_ROWS
    right = tap % KERNEL_COLUMNS * dilation_columns + RADIUS * SIDE - PADDING_COLUMNS

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
        source = position_in(block, row, column, SIDE_BITS)
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


@triton.jit(do_not_specialize=["parts"])
def sum_parts_kernel(
    parts_ptr,  # [parts, ALL_TAPS + 1, C]
    weight_ptr,  # [C, ALL_TAPS]
    bias_ptr,  # [C]
    parts,
    channels,
    ALL_TAPS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    LANES: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    elements = (ALL_TAPS + 1) * channels
    element = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    total = sum_of_parts(parts_ptr, element, parts, elements, ACCUMULATOR, LANES, ELEMENTS)
    total = total.to(weight_ptr.dtype.element_ty)
    tap, channel = element // channels, element % channels
    tl.store(weight_ptr + channel * ALL_TAPS + tap, total, mask=tap < ALL_TAPS)
    tl.store(bias_ptr + channel, total, mask=tap == ALL_TAPS)


def sum_positions(
    configuration: Configuration,
    grad: Tensor,
    x: Tensor,
    neighbours: Tensor,
    kernel: Sequence[int],
    stride: int,
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The gradients in weight, `[C, 1, kh, kw]`, and bias, `[C]`."""
    blocks, outputs, channels = grad.shape
    per_part, sums = empty_parts(grad, kernel)
    if sums.numel() > 0:
        programs = configuration.grid(TAPS=sums.shape[1], CHANNELS=channels)[0] * sums.shape[0]
        sum_positions_kernel[(programs,)](
            grad.contiguous(),
            x.contiguous(),
            neighbours.contiguous(),
            sums,
            blocks * outputs,
            per_part,
            channels,
            *dilation,
            PADDING_ROWS=padding[0],
            PADDING_COLUMNS=padding[1],
            KERNEL_ROWS=kernel[0],
            KERNEL_COLUMNS=kernel[1],
            RADIUS=math.isqrt(neighbours.shape[1]) // 2,
            SIDE_BITS=side_bits(x.shape[1]),
            STRIDE_BITS=stride.bit_length() - 1,
            ACCUMULATOR=accumulator(x.dtype),
            LANES=LANES,
            **configuration.options,
        )
    return add_parts(sums, kernel, x.dtype)


def empty_parts(grad: Tensor, kernel: Sequence[int]) -> tuple[int, Tensor]:
    """The positions of each part, and room for the sums of all: `[parts, kh * kw + 1, C]`."""
    positions, taps = grad.shape[0] * grad.shape[1], kernel[0] * kernel[1]
    per_part = max(MIN_POSITIONS_PER_PART, triton.cdiv(positions, MAX_PARTS))
    dtype = torch.float64 if accumulator(grad.dtype) == tl.float64 else torch.float32
    parts = triton.cdiv(positions, per_part)
    return per_part, grad.new_empty(parts, taps + 1, grad.shape[2], dtype=dtype)


def add_parts(sums: Tensor, kernel: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`[parts, kh * kw + 1, C] -> [C, 1, kh, kw] and [C]`: zeros of no parts."""
    parts, _, channels = sums.shape
    weight = sums.new_empty(channels, 1, *kernel, dtype=dtype)
    bias = sums.new_empty(channels, dtype=dtype)
    if channels > 0:
        elements = sums.shape[1] * channels
        sum_parts_kernel[(triton.cdiv(elements, ELEMENTS),)](
            sums,
            weight,
            bias,
            parts,
            channels,
            ALL_TAPS=sums.shape[1] - 1,
            ACCUMULATOR=accumulator(dtype),
            LANES=PART_LANES,
            ELEMENTS=ELEMENTS,
        )
    return weight, bias


def launch(
    configuration: Configuration,
    grad: Tensor,
    x: Tensor,
    neighbours: Tensor,
    kernel: list[int],
    dilation: list[int],
) -> tuple[Tensor, Tensor]:
    """Runs one configuration; the same as `masked_conv2d_weight_grad`."""
    padding = [step * (side // 2) for step, side in zip(dilation, kernel, strict=True)]
    return sum_positions(configuration, grad, x, neighbours, kernel, 1, padding, dilation)


def masked_conv2d_weight_grad(
    grad: Tensor, x: Tensor, neighbours: Tensor, kernel: list[int], dilation: list[int]
) -> tuple[Tensor, Tensor]:
    """Gradients in weight and bias, see `reference.masked_conv2d_weight_grad`."""
    problem = describe(x, kernel)
    arguments = (grad, x, neighbours, kernel, dilation)
    return tuning.run("masked_conv2d_weight_grad", problem, CONFIGURATIONS, launch, arguments)
