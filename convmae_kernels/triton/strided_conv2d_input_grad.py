"""`strided_conv2d_input_grad` in Triton."""

import math

import triton
import triton.language as tl
from torch import Tensor

from convmae_kernels.triton import tuning
from convmae_kernels.triton.accumulation import accumulator
from convmae_kernels.triton.strided_conv2d import describe
from convmae_kernels.triton.tile import position_in, tile_of_program
from convmae_kernels.triton.tuning import Configuration
from convmae_kernels.triton.zorder import compact, side_bits

CONFIGURATIONS = (
    Configuration("square", {"POSITIONS": 16, "CHANNELS": 64}, num_warps=4),
    Configuration("wide", {"POSITIONS": 8, "CHANNELS": 128}, num_warps=4),
    Configuration("tall", {"POSITIONS": 128, "CHANNELS": 8}, num_warps=4),
)


@triton.jit(do_not_specialize=["positions"])
def strided_conv2d_input_grad_kernel(
    grad_ptr,  # [T, (s / stride) ** 2, C]
    weight_ptr,  # [kh * kw, C]
    neighbours_ptr,  # int32 [T, (2 * RADIUS + 1) ** 2]
    x_ptr,  # the gradient of the input, [T, s*s, C]
    positions,  # T * s*s
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
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    position, channel = tile_of_program(channels, POSITIONS, CHANNELS)
    inside, real = position < positions, channel < channels

    SIDE: tl.constexpr = 1 << SIDE_BITS
    STRIDE: tl.constexpr = 1 << STRIDE_BITS
    OUT_BITS: tl.constexpr = SIDE_BITS - STRIDE_BITS
    TABLE_SIDE: tl.constexpr = 2 * RADIUS + 1
    rank = (position & (SIDE * SIDE - 1)).to(tl.int32)
    # Row and column of the output that the first tap meets, times the stride, in the block and its
    # neighbours; there is one where the stride divides both.
    bottom = compact(rank >> 1, SIDE_BITS) + RADIUS * SIDE + padding_rows
    right = compact(rank, SIDE_BITS) + RADIUS * SIDE + padding_columns
    table_ptr = neighbours_ptr + (position >> (2 * SIDE_BITS)) * (TABLE_SIDE * TABLE_SIDE)

    # Each sum is made in the order of the taps and by fused multiply-adds, whatever the tile.
    sums = tl.zeros([POSITIONS, CHANNELS], ACCUMULATOR)
    for i in range(KERNEL_ROWS):
        row = bottom - i * dilation_rows
        meets_row = inside & ((row & (STRIDE - 1)) == 0)
        row = row >> STRIDE_BITS
        row_ptr = table_ptr + (row >> OUT_BITS) * TABLE_SIDE
        for j in tl.static_range(KERNEL_COLUMNS):
            column = right - j * dilation_columns
            meets = meets_row & ((column & (STRIDE - 1)) == 0)
            column = column >> STRIDE_BITS
            block = tl.load(row_ptr + (column >> OUT_BITS), mask=meets, other=-1)
            source = position_in(block, row, column, OUT_BITS)
            grad = tl.load(
                grad_ptr + source[:, None] * channels + channel[None, :],
                mask=(block >= 0)[:, None] & real[None, :],
                other=0,
            )
            tap_ptr = weight_ptr + (i * KERNEL_COLUMNS + j) * channels
            weight = tl.load(tap_ptr + channel, mask=real, other=0)
            sums = tl.fma(grad.to(ACCUMULATOR), weight.to(ACCUMULATOR)[None, :], sums)
    tl.store(
        x_ptr + position[:, None] * channels + channel[None, :],
        sums.to(x_ptr.dtype.element_ty),
        mask=inside[:, None] & real[None, :],
    )


def launch(
    configuration: Configuration,
    grad: Tensor,
    weight: Tensor,
    neighbours: Tensor,
    stride: int,
    padding: list[int],
    dilation: list[int],
) -> tuple[Tensor]:
    """Runs one configuration; the same as `strided_conv2d_input_grad`."""
    blocks, outputs, channels = grad.shape
    square = outputs * stride * stride
    x = grad.new_empty(blocks, square, channels)
    if x.numel() > 0:
        grid = configuration.grid(POSITIONS=blocks * square, CHANNELS=channels)
        strided_conv2d_input_grad_kernel[grid](
            grad.contiguous(),
            weight.flatten(1).t().contiguous(),
            neighbours.contiguous(),
            x,
            blocks * square,
            channels,
            *padding,
            *dilation,
            KERNEL_ROWS=weight.shape[2],
            KERNEL_COLUMNS=weight.shape[3],
            RADIUS=math.isqrt(neighbours.shape[1]) // 2,
            SIDE_BITS=side_bits(square),
            STRIDE_BITS=stride.bit_length() - 1,
            ACCUMULATOR=accumulator(grad.dtype),
            **configuration.options,
        )
    return (x,)


def strided_conv2d_input_grad(
    grad: Tensor,
    weight: Tensor,
    neighbours: Tensor,
    stride: int,
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """The gradient in the input, see `reference.strided_conv2d_input_grad`."""
    problem = describe(grad, weight.shape[2:], stride)
    arguments = (grad, weight, neighbours, stride, padding, dilation)
    (x,) = tuning.run("strided_conv2d_input_grad", problem, CONFIGURATIONS, launch, arguments)
    return x
