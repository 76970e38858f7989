"""`grouped_conv2d_weight_grad` in Triton: sums of parts of the positions, then of the parts.

For each tap, products of the gradients of outputs with what these see through it. No sum depends on
the configuration: the parts and the depth of the products are the problem's, and parts are added in
order. The configurations of a problem differ in sizes that GPUs multiply by the same instructions.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from convmae_kernels.triton import tuning
from convmae_kernels.triton.accumulation import accumulator, pairwise_sum
from convmae_kernels.triton.grouped_conv2d import depth, describe, multiplied
from convmae_kernels.triton.tuning import Configuration
from convmae_kernels.triton.zorder import compact, side_bits, spread

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

MIN_POSITIONS_PER_PART, ENOUGH_TILES = 512, 1024  # parts are made until there are so many tiles
LANES, CHANNELS = 32, 64  # the tile of the kernel that sums for the bias
ELEMENTS = 256  # and of the one that adds the parts
LEAST_OF_MANY = 64  # output channels of a group

OF_MANY_CHANNELS = (
    Configuration("square", {"OUTPUTS": 64, "INPUTS": 64, "STAGES": 3}, num_warps=4),
    Configuration("few_inputs", {"OUTPUTS": 64, "INPUTS": 16, "STAGES": 3}, num_warps=4),
    Configuration("tall", {"OUTPUTS": 128, "INPUTS": 64, "STAGES": 3}, num_warps=4),
    Configuration("large", {"OUTPUTS": 128, "INPUTS": 128, "STAGES": 3}, num_warps=8),
)
OF_FEW_CHANNELS = (
    Configuration("square", {"OUTPUTS": 32, "INPUTS": 32, "STAGES": 3}, num_warps=4),
    Configuration("small", {"OUTPUTS": 16, "INPUTS": 16, "STAGES": 3}, num_warps=2),
    Configuration("wide", {"OUTPUTS": 32, "INPUTS": 64, "STAGES": 3}, num_warps=4),
)


@triton.jit(do_not_specialize=["positions", "positions_per_part"])
def sum_positions_kernel(
    grad_ptr,  # [T, 4 ** SIDE_BITS, groups * outputs]
    x_ptr,  # [T, S, groups * inputs], S positions of a block
    neighbours_ptr,  # int32 [T, (2 * RADIUS + 1) ** 2]
    parts_ptr,  # [parts, kh * kw, groups, outputs, inputs]
    positions,  # of grad
    positions_per_part,
    inputs,
    outputs,
    groups,
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
    POSITIONS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    ALL_TAPS: tl.constexpr = KERNEL_ROWS * KERNEL_COLUMNS
    SOURCE_BITS: tl.constexpr = SIDE_BITS + STRIDE_BITS
    TABLE_SIDE: tl.constexpr = 2 * RADIUS + 1
    input_tiles, output_tiles = tl.cdiv(inputs, INPUTS), tl.cdiv(outputs, OUTPUTS)
    pid = tl.program_id(0)
    tap = pid % ALL_TAPS
    channel = (pid // ALL_TAPS % input_tiles) * INPUTS + tl.arange(0, INPUTS)
    output = (pid // ALL_TAPS // input_tiles % output_tiles) * OUTPUTS + tl.arange(0, OUTPUTS)
    group_and_part = pid // ALL_TAPS // input_tiles // output_tiles
    group = (group_and_part % groups).to(tl.int64)
    part = (group_and_part // groups).to(tl.int64)
    real_input, real_output = channel < inputs, output < outputs
    down = tap // KERNEL_COLUMNS * dilation_rows - padding_rows + (RADIUS << SOURCE_BITS)
    right = tap % KERNEL_COLUMNS * dilation_columns - padding_columns + (RADIUS << SOURCE_BITS)

    sums = tl.zeros([OUTPUTS, INPUTS], ACCUMULATOR)
    first = part * positions_per_part
    last = tl.minimum(first + positions_per_part, positions)
    for start in tl.range(first, last, POSITIONS, num_stages=STAGES):
        position = start + tl.arange(0, POSITIONS)
        inside = position < last
        grad = tl.load(
            grad_ptr + (position[:, None] * groups + group) * outputs + output[None, :],
            mask=inside[:, None] & real_output[None, :],
            other=0,
        )
        rank = (position & ((1 << 2 * SIDE_BITS) - 1)).to(tl.int32)
        row = (compact(rank >> 1, SIDE_BITS) << STRIDE_BITS) + down
        column = (compact(rank, SIDE_BITS) << STRIDE_BITS) + right
        table_ptr = neighbours_ptr + (position >> (2 * SIDE_BITS)) * (TABLE_SIDE * TABLE_SIDE)
        block = tl.load(
            table_ptr + (row >> SOURCE_BITS) * TABLE_SIDE + (column >> SOURCE_BITS),
            mask=inside,
            other=-1,
        )
        source = block.to(tl.int64) << (2 * SOURCE_BITS)
        source += spread(row & ((1 << SOURCE_BITS) - 1), SOURCE_BITS) << 1
        source += spread(column & ((1 << SOURCE_BITS) - 1), SOURCE_BITS)
        x = tl.load(
            x_ptr + (source[:, None] * groups + group) * inputs + channel[None, :],
            mask=(block >= 0)[:, None] & real_input[None, :],
            other=0,
        )
        sums = tl.dot(tl.trans(grad), x, sums, input_precision="ieee", out_dtype=ACCUMULATOR)

    matrix = (part * ALL_TAPS + tap) * groups + group
    tl.store(
        parts_ptr + (matrix * outputs + output[:, None]) * inputs + channel[None, :],
        sums,
        mask=real_output[:, None] & real_input[None, :],
    )


@triton.jit(do_not_specialize=["positions", "positions_per_part"])
def sum_grads_kernel(
    grad_ptr,  # [positions, channels]
    parts_ptr,  # [parts, channels]
    positions,
    positions_per_part,
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
    first = part * positions_per_part
    last = tl.minimum(first + positions_per_part, positions)
    sums = tl.zeros([LANES, CHANNELS], ACCUMULATOR)
    for start in range(first, last, LANES):
        position = start + tl.arange(0, LANES)
        sums += tl.load(
            grad_ptr + position[:, None] * channels + channel[None, :],
            mask=(position < last)[:, None] & real[None, :],
            other=0,
        ).to(ACCUMULATOR)
    total = tl.reshape(pairwise_sum(sums, 1, LANES, CHANNELS), (CHANNELS,))
    tl.store(parts_ptr + part * channels + channel, total, mask=real)


@triton.jit(do_not_specialize=["parts"])
def sum_parts_kernel(
    parts_ptr,  # [parts, taps, rows]
    result_ptr,  # [rows, taps]
    parts,
    elements,  # taps * rows
    taps,
    rows,
    ACCUMULATOR: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    element = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    real = element < elements
    sums = tl.zeros([ELEMENTS], ACCUMULATOR)
    part_ptr = parts_ptr + element
    for _ in range(parts):
        sums += tl.load(part_ptr, mask=real, other=0)
        part_ptr += elements
    total = sums.to(result_ptr.dtype.element_ty)
    tl.store(result_ptr + element % rows * taps + element // rows, total, mask=real)


def _add_parts(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """`[parts, taps, rows] -> [rows, taps]`: the parts in order; zeros of none."""
    parts, taps, rows = sums.shape
    result = sums.new_empty(rows, taps, dtype=dtype)
    if result.numel() > 0:
        sum_parts_kernel[(triton.cdiv(result.numel(), ELEMENTS),)](
            sums,
            result,
            parts,
            result.numel(),
            taps,
            rows,
            ACCUMULATOR=accumulator(dtype),
            ELEMENTS=ELEMENTS,
        )
    return result


def _positions_per_part(positions: int, tiles: int) -> int:
    """As the problem wants it, and a multiple of the depth of any product."""
    parts = min(triton.cdiv(positions, MIN_POSITIONS_PER_PART), triton.cdiv(ENOUGH_TILES, tiles))
    return triton.cdiv(triton.cdiv(positions, max(1, parts)), 64) * 64


def launch(
    configuration: Configuration,
    grad: Tensor,
    x: Tensor,
    neighbours: Tensor,
    kernel: Sequence[int],
    stride: int,
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    """Runs one configuration; the same as `grouped_conv2d_weight_grad`."""
    result, grad, x = x.dtype, multiplied(grad), multiplied(x)
    blocks, square, channels = grad.shape
    inputs, outputs, taps = x.shape[2] // groups, channels // groups, kernel[0] * kernel[1]
    positions = blocks * square
    tiles = taps * groups * triton.cdiv(outputs, 64) * triton.cdiv(inputs, 64)
    per_part = _positions_per_part(positions, max(1, tiles))
    parts = triton.cdiv(positions, per_part) if positions else 0
    kind = accumulator(x.dtype)
    dtype = torch.float64 if kind == tl.float64 else torch.float32
    sums = x.new_empty(parts, taps, channels * inputs, dtype=dtype)
    bias_sums = x.new_empty(parts, 1, channels, dtype=dtype)
    grad = grad.contiguous()
    if sums.numel() > 0:
        programs = configuration.grid(OUTPUTS=outputs, INPUTS=inputs)[0] * taps * groups * parts
        sum_positions_kernel[(programs,)](
            grad,
            x.contiguous(),
            neighbours.contiguous(),
            sums,
            positions,
            per_part,
            inputs,
            outputs,
            groups,
            *padding,
            *dilation,
            KERNEL_ROWS=kernel[0],
            KERNEL_COLUMNS=kernel[1],
            RADIUS=math.isqrt(neighbours.shape[1]) // 2,
            SIDE_BITS=side_bits(square),
            STRIDE_BITS=stride.bit_length() - 1,
            ACCUMULATOR=kind,
            POSITIONS=depth(per_part, x.dtype),
            **configuration.options,
        )
    if bias_sums.numel() > 0:
        sum_grads_kernel[(triton.cdiv(channels, CHANNELS) * parts,)](
            grad,
            bias_sums,
            positions,
            per_part,
            channels,
            ACCUMULATOR=kind,
            LANES=LANES,
            CHANNELS=CHANNELS,
        )
    weight = _add_parts(sums, result).view(channels, inputs, *kernel)
    return weight, _add_parts(bias_sums, result).view(channels)


def grouped_conv2d_weight_grad(
    grad: Tensor,
    x: Tensor,
    neighbours: Tensor,
    kernel: list[int],
    stride: int,
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    """Gradients in weight and bias, see `reference.grouped_conv2d_weight_grad`."""
    outputs = grad.shape[2]
    problem = describe(grad, (outputs, x.shape[2] // groups, *kernel), stride, groups)
    many = outputs // groups >= LEAST_OF_MANY
    configurations = OF_MANY_CHANNELS if many else OF_FEW_CHANNELS
    arguments = (grad, x, neighbours, kernel, stride, padding, dilation, groups)
    return tuning.run("grouped_conv2d_weight_grad", problem, configurations, launch, arguments)
