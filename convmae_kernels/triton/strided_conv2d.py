"""`strided_conv2d` in Triton."""

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from convmae_kernels.triton import tuning
from convmae_kernels.triton.accumulation import accumulator
from convmae_kernels.triton.tile import position_in, tile_of_program
from convmae_kernels.triton.tuning import Configuration
from convmae_kernels.triton.zorder import compact, side_bits

CONFIGURATIONS = (
    Configuration("square", {"POSITIONS": 16, "CHANNELS": 64}, num_warps=4),
    Configuration("wide", {"POSITIONS": 8, "CHANNELS": 128}, num_warps=4),
    Configuration("tall", {"POSITIONS": 128, "CHANNELS": 8}, num_warps=4),
)


@triton.jit(do_not_specialize=["positions"])
def strided_conv2d_kernel(
    x_ptr,  # [T, s*s, C]
    weight_ptr,  # [kh * kw, C]
    bias_ptr,  # [C], or anything
    neighbours_ptr,  # int32 [T, (2 * RADIUS + 1) ** 2]
    y_ptr,  # [T, (s / stride) ** 2, C]
    positions,  # T * (s / stride) ** 2
    channels,
    dilation_rows,
    dilation_columns,
    PADDING_ROWS: tl.constexpr,
    PADDING_COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
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
    OUT_BITS: tl.constexpr = SIDE_BITS - STRIDE_BITS
    TABLE_SIDE: tl.constexpr = 2 * RADIUS + 1
    rank = (position & ((1 << (2 * OUT_BITS)) - 1)).to(tl.int32)
    # Row and column of the input that the first tap meets, in the block and its neighbours.
    top = (compact(rank >> 1, OUT_BITS) << STRIDE_BITS) + RADIUS * SIDE - PADDING_ROWS
    left = (compact(rank, OUT_BITS) << STRIDE_BITS) + RADIUS * SIDE - PADDING_COLUMNS
    table_ptr = neighbours_ptr + (position >> (2 * OUT_BITS)) * (TABLE_SIDE * TABLE_SIDE)

    # Each sum is made in the order of the taps and by fused multiply-adds, whatever the tile.
    y = tl.zeros([POSITIONS, CHANNELS], ACCUMULATOR)
    if HAS_BIAS:
        y += tl.load(bias_ptr + channel, mask=real, other=0).to(ACCUMULATOR)[None, :]
    for i in range(KERNEL_ROWS):
        row = top + i * dilation_rows
        row_ptr = table_ptr + (row >> SIDE_BITS) * TABLE_SIDE
        for j in tl.static_range(KERNEL_COLUMNS):
            column = left + j * dilation_columns
            block = tl.load(row_ptr + (column >> SIDE_BITS), mask=inside, other=-1)
            source = position_in(block, row, column, SIDE_BITS)
            x = tl.load(
                x_ptr + source[:, None] * channels + channel[None, :],
                mask=(block >= 0)[:, None] & real[None, :],
                other=0,
            )
            tap_ptr = weight_ptr + (i * KERNEL_COLUMNS + j) * channels
            weight = tl.load(tap_ptr + channel, mask=real, other=0)
            y = tl.fma(x.to(ACCUMULATOR), weight.to(ACCUMULATOR)[None, :], y)
    tl.store(
        y_ptr + position[:, None] * channels + channel[None, :],
        y.to(y_ptr.dtype.element_ty),
        mask=inside[:, None] & real[None, :],
    )


def sum_taps(
    configuration: Configuration,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    neighbours: Tensor,
    stride: int,
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Runs the kernel."""
    blocks, square, channels = x.shape
    outputs = square // (stride * stride)
    y = x.new_empty(blocks, outputs, channels)
    if y.numel() > 0:
        taps = weight.flatten(1).t().contiguous()
        strided_conv2d_kernel[configuration.grid(POSITIONS=blocks * outputs, CHANNELS=channels)](
            x.contiguous(),
            taps,
            taps if bias is None else bias.contiguous(),
            neighbours.contiguous(),
            y,
            blocks * outputs,
            channels,
            *dilation,
            PADDING_ROWS=padding[0],
            PADDING_COLUMNS=padding[1],
            HAS_BIAS=bias is not None,
            KERNEL_ROWS=weight.shape[2],
            KERNEL_COLUMNS=weight.shape[3],
            RADIUS=math.isqrt(neighbours.shape[1]) // 2,
            SIDE_BITS=side_bits(square),
            STRIDE_BITS=stride.bit_length() - 1,
            ACCUMULATOR=accumulator(x.dtype),
            **configuration.options,
        )
    return y


def launch(configuration: Configuration, *arguments) -> tuple[Tensor]:
    """Runs one configuration; the same as `strided_conv2d`."""
    return (sum_taps(configuration, *arguments),)


def describe(x: Tensor, kernel: Sequence[int], stride: int = 1) -> str:
    """What the choice of a configuration depends on, of a depthwise op and of its gradients."""
    step = f", stride {stride}" if stride > 1 else ""
    return (
        f"kernel {kernel[0]}x{kernel[1]}{step}, side {math.isqrt(x.shape[1])}, "
        f"{x.shape[2]} channels, {x.dtype}"
    )


def strided_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    neighbours: Tensor,
    stride: int,
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """Depthwise convolution with a stride, see `reference.strided_conv2d`."""
    problem = describe(x, weight.shape[2:], stride)
    arguments = (x, weight, bias, neighbours, stride, padding, dilation)
    (y,) = tuning.run("strided_conv2d", problem, CONFIGURATIONS, launch, arguments)
    return y
