"""`grouped_conv2d` in Triton, without groups too: matrix products of what is visible for each tap.

No window is copied: a program takes the outputs of some positions and channels, and for each tap
multiplies the features where they lie. A tap through which none of its outputs sees anything costs
a look into the table of neighbours. The kernel serves the gradient in the input too, which is the
same sum with source and result exchanged.

No sum depends on the configuration: each is made in the order of taps and channels, by products
whose depth the problem decides. All configurations have the products of 64 positions or more, which
GPUs do by the same instructions.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from convmae_kernels.triton import tuning
from convmae_kernels.triton.accumulation import accumulator
from convmae_kernels.triton.tile import position_in
from convmae_kernels.triton.tuning import Configuration
from convmae_kernels.triton.zorder import compact, side_bits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

CONFIGURATIONS = (
    Configuration("square", {"POSITIONS": 64, "OUTPUTS": 64, "STAGES": 3}, num_warps=4),
    Configuration("few_outputs", {"POSITIONS": 64, "OUTPUTS": 16, "STAGES": 3}, num_warps=4),
    Configuration("narrow", {"POSITIONS": 128, "OUTPUTS": 32, "STAGES": 3}, num_warps=4),
    Configuration("tall", {"POSITIONS": 128, "OUTPUTS": 64, "STAGES": 3}, num_warps=4),
    Configuration("wide", {"POSITIONS": 64, "OUTPUTS": 128, "STAGES": 3}, num_warps=4),
    Configuration("large", {"POSITIONS": 128, "OUTPUTS": 128, "STAGES": 2}, num_warps=8),
)


@triton.jit(do_not_specialize=["positions"])
def sum_taps_kernel(
    x_ptr,  # [T, S, groups * inputs], S positions of a block
    weight_ptr,  # [kh * kw, groups, inputs, outputs]
    bias_ptr,  # [groups * outputs], or anything
    neighbours_ptr,  # int32 [T, (2 * RADIUS + 1) ** 2]
    y_ptr,  # [T, 4 ** SIDE_BITS, groups * outputs]
    positions,  # of y; of an input gradient, those of each phase
    inputs,
    outputs,
    groups,
    padding_rows,
    padding_columns,
    dilation_rows,
    dilation_columns,
    HAS_BIAS: tl.constexpr,
    IS_GRAD: tl.constexpr,
    KERNEL_ROWS: tl.constexpr,
    KERNEL_COLUMNS: tl.constexpr,
    RADIUS: tl.constexpr,
    SIDE_BITS: tl.constexpr,
    STRIDE_BITS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    INPUTS: tl.constexpr,
    POSITIONS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    SOURCE_BITS: tl.constexpr = SIDE_BITS - STRIDE_BITS if IS_GRAD else SIDE_BITS + STRIDE_BITS
    # Inputs that leave the same rests when divided by the stride are reached by the same taps.
    PHASE_BITS: tl.constexpr = 2 * STRIDE_BITS if IS_GRAD else 0
    TABLE_SIDE: tl.constexpr = 2 * RADIUS + 1
    output_tiles = tl.cdiv(outputs, OUTPUTS)
    pid = tl.program_id(0)
    output = (pid % output_tiles) * OUTPUTS + tl.arange(0, OUTPUTS)
    group = (pid // output_tiles % groups).to(tl.int64)
    tile = pid // output_tiles // groups
    number = (tile >> PHASE_BITS).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    position = (number << PHASE_BITS) + (tile & ((1 << PHASE_BITS) - 1))
    inside, real = number < positions, output < outputs

    rank = (position & ((1 << 2 * SIDE_BITS) - 1)).to(tl.int32)
    row, column = compact(rank >> 1, SIDE_BITS), compact(rank, SIDE_BITS)
    table_ptr = neighbours_ptr + (position >> (2 * SIDE_BITS)) * (TABLE_SIDE * TABLE_SIDE)

    y = tl.zeros([POSITIONS, OUTPUTS], ACCUMULATOR)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + group * outputs + output, mask=real, other=0)
        y += bias.to(ACCUMULATOR)[None, :]
    for tap in range(KERNEL_ROWS * KERNEL_COLUMNS):
        down = tap // KERNEL_COLUMNS * dilation_rows - padding_rows
        right = tap % KERNEL_COLUMNS * dilation_columns - padding_columns
        # Row and column among the positions of the source's block and its neighbours.
        if IS_GRAD:
            source_row = row - down + (RADIUS << SIDE_BITS)
            source_column = column - right + (RADIUS << SIDE_BITS)
            rest = (source_row | source_column) & ((1 << STRIDE_BITS) - 1)
            meets = inside & (rest == 0)
            source_row, source_column = source_row >> STRIDE_BITS, source_column >> STRIDE_BITS
        else:
            source_row = (row << STRIDE_BITS) + down + (RADIUS << SOURCE_BITS)
            source_column = (column << STRIDE_BITS) + right + (RADIUS << SOURCE_BITS)
            meets = inside
        neighbour = (source_row >> SOURCE_BITS) * TABLE_SIDE + (source_column >> SOURCE_BITS)
        block = tl.load(table_ptr + neighbour, mask=meets, other=-1)
        if tl.max(block, axis=0) >= 0:
            source = position_in(block, source_row, source_column, SOURCE_BITS)
            row_ptr = x_ptr + (source * groups + group) * inputs
            tap_ptr = weight_ptr + (tap * groups + group) * inputs * outputs
            for first in tl.range(0, inputs, INPUTS, num_stages=STAGES):
                channel = first + tl.arange(0, INPUTS)
                x = tl.load(
                    row_ptr[:, None] + channel[None, :],
                    mask=(block >= 0)[:, None] & (channel < inputs)[None, :],
                    other=0,
                )
                weight = tl.load(
                    tap_ptr + channel[:, None] * outputs + output[None, :],
                    mask=(channel < inputs)[:, None] & real[None, :],
                    other=0,
                )
                y = tl.dot(x, weight, y, input_precision="ieee", out_dtype=ACCUMULATOR)
    tl.store(
        y_ptr + (position[:, None] * groups + group) * outputs + output[None, :],
        y.to(y_ptr.dtype.element_ty),
        mask=inside[:, None] & real[None, :],
    )


def depth(size: int, dtype: torch.dtype) -> int:
    """Terms of a sum that one product adds: 128 bytes of a row or, where sums are short, fewer."""
    return min(max(16, triton.next_power_of_2(size)), max(16, 128 // dtype.itemsize))


def multiplied(x: Tensor) -> Tensor:
    """`x`, or its copy in float32: Triton's interpreter cannot multiply bfloat16."""
    return x.float() if x.device.type == "cpu" and x.dtype == torch.bfloat16 else x


def sum_taps(
    configuration: Configuration,
    x: Tensor,
    matrices: Tensor,
    bias: Tensor | None,
    neighbours: Tensor,
    kernel: Sequence[int],
    stride: int,
    padding: Sequence[int],
    dilation: Sequence[int],
    is_grad: bool,
) -> Tensor:
    """Runs the kernel; `matrices` is `[kh * kw, groups, inputs, outputs]`, contiguous."""
    result, x, matrices = x.dtype, multiplied(x), multiplied(matrices)
    blocks, source_square, _ = x.shape
    _, groups, inputs, outputs = matrices.shape
    square = source_square * stride**2 if is_grad else source_square // stride**2
    y = x.new_empty(blocks, square, groups * outputs)
    if y.numel() > 0:
        phases = stride**2 if is_grad else 1
        positions = blocks * square // phases
        programs = configuration.grid(POSITIONS=positions, OUTPUTS=outputs)[0] * phases * groups
        sum_taps_kernel[(programs,)](
            x.contiguous(),
            matrices,
            matrices if bias is None else bias.contiguous(),
            neighbours.contiguous(),
            y,
            positions,
            inputs,
            outputs,
            groups,
            *padding,
            *dilation,
            HAS_BIAS=bias is not None,
            IS_GRAD=is_grad,
            KERNEL_ROWS=kernel[0],
            KERNEL_COLUMNS=kernel[1],
            RADIUS=math.isqrt(neighbours.shape[1]) // 2,
            SIDE_BITS=side_bits(square),
            STRIDE_BITS=stride.bit_length() - 1,
            ACCUMULATOR=accumulator(x.dtype),
            INPUTS=depth(inputs, x.dtype),
            **configuration.options,
        )
    return y.to(result)


def launch(
    configuration: Configuration,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    neighbours: Tensor,
    stride: int,
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor]:
    """Runs one configuration; the same as `grouped_conv2d`."""
    matrices = weight.flatten(2).unflatten(0, (groups, -1)).permute(3, 0, 2, 1).contiguous()
    shape = weight.shape[2:], stride, padding, dilation
    return (sum_taps(configuration, x, matrices, bias, neighbours, *shape, is_grad=False),)


def describe(x: Tensor, weight_shape: Sequence[int], stride: int, groups: int) -> str:
    """What the choice of a configuration depends on, for `tuning.run`."""
    outputs, inputs, rows, columns = weight_shape
    return (
        f"kernel {rows}x{columns}, side {math.isqrt(x.shape[1])}, stride {stride}, "
        f"{groups} groups of {inputs} and {outputs // groups} channels, {x.dtype}"
    )


def grouped_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    neighbours: Tensor,
    stride: int,
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Convolution of packed features in groups of channels, see `reference.window_conv2d`."""
    problem = describe(x, weight.shape, stride, groups)
    arguments = (x, weight, bias, neighbours, stride, padding, dilation, groups)
    (y,) = tuning.run("grouped_conv2d", problem, CONFIGURATIONS, launch, arguments)
    return y
