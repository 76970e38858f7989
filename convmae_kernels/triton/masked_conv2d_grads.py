"""`masked_conv2d_grads` in Triton: one look at the window of `grad` serves all three gradients.

No sum depends on the configuration: a gradient in `x` is summed along the rows of the kernel, and
these are added up pairwise; those in weight and bias are summed in parts of the positions and in
`LANES`, as `masked_conv2d_weight_grad` does.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from convmae_kernels.triton import tuning
from convmae_kernels.triton.accumulation import accumulator, pairwise_sum
from convmae_kernels.triton.masked_conv2d_weight_grad import add_parts, empty_parts
from convmae_kernels.triton.strided_conv2d import describe
from convmae_kernels.triton.tile import position_in
from convmae_kernels.triton.tuning import Configuration
from convmae_kernels.triton.zorder import compact, side_bits

LANES = 4

CONFIGURATIONS = (
    Configuration("square", {"CHANNELS": 32}, num_warps=8),
    Configuration("wide", {"CHANNELS": 64}, num_warps=8),
    Configuration("narrow", {"CHANNELS": 16}, num_warps=4),
    Configuration("few_warps", {"CHANNELS": 32}, num_warps=4),
)


@triton.jit(do_not_specialize=["positions", "positions_per_part"])
def masked_conv2d_grads_kernel(
    grad_ptr,  # [T, s*s, C]
    x_ptr,  # [T, s*s, C]
    weight_ptr,  # [kh * kw, C]
    neighbours_ptr,  # int32 [T, (2 * RADIUS + 1) ** 2]
    grad_x_ptr,  # [T, s*s, C]
    parts_ptr,  # [parts, kh * kw + 1, C]
    positions,  # T * s*s
    positions_per_part,
    channels,
    dilation_rows,
    dilation_columns,
    KERNEL_ROWS: tl.constexpr,
    KERNEL_COLUMNS: tl.constexpr,
    RADIUS: tl.constexpr,
    SIDE_BITS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,  # the next power of two from KERNEL_ROWS on
    CHANNELS: tl.constexpr,
):
    ALL_TAPS: tl.constexpr = KERNEL_ROWS * KERNEL_COLUMNS
    SIDE: tl.constexpr = 1 << SIDE_BITS
    TABLE_SIDE: tl.constexpr = 2 * RADIUS + 1
    channel_tiles = tl.cdiv(channels, CHANNELS)
    pid = tl.program_id(0)
    channel = (pid % channel_tiles) * CHANNELS + tl.arange(0, CHANNELS)
    part = (pid // channel_tiles).to(tl.int64)
    real = channel < channels
    # The window is walked in its own order, which meets the taps in reverse.
    i = tl.arange(0, ROWS)
    tap_row = KERNEL_ROWS - 1 - i
    real_row = i < KERNEL_ROWS
    real_tap = real_row[:, None] & real[None, :]

    sums = ()  # a tensor for each column of the kernel
    for _ in tl.static_range(KERNEL_COLUMNS):
        sums = sums + (tl.zeros([ROWS, LANES, CHANNELS], ACCUMULATOR),)  # type: ignore[assignment]
    bias_sums = tl.zeros([LANES, CHANNELS], ACCUMULATOR)
    first = part * positions_per_part
    last = tl.minimum(first + positions_per_part, positions)
    for start in range(first, last, LANES):
        position = start + tl.arange(0, LANES)
        inside = position < last
        own = position[:, None] * channels + channel[None, :]
        own_mask = inside[:, None] & real[None, :]
        x = tl.load(x_ptr + own, mask=own_mask, other=0).to(ACCUMULATOR)
        bias_sums += tl.load(grad_ptr + own, mask=own_mask, other=0).to(ACCUMULATOR)

        rank = (position & (SIDE * SIDE - 1)).to(tl.int32)
        # Row and column in the window of the block and its neighbours.
        row = compact(rank >> 1, SIDE_BITS) + RADIUS * SIDE
        row = row[None, :] + ((i - KERNEL_ROWS // 2) * dilation_rows)[:, None]  # [ROWS, LANES]
        left = compact(rank, SIDE_BITS) + RADIUS * SIDE - KERNEL_COLUMNS // 2 * dilation_columns
        table_ptr = neighbours_ptr + (position >> (2 * SIDE_BITS)) * (TABLE_SIDE * TABLE_SIDE)
        row_ptr = table_ptr[None, :] + (row >> SIDE_BITS) * TABLE_SIDE

        products = tl.zeros([ROWS, LANES, CHANNELS], ACCUMULATOR)
        added = ()
        for j in tl.static_range(KERNEL_COLUMNS):
            column = left + j * dilation_columns
            block = tl.load(
                row_ptr + (column >> SIDE_BITS)[None, :],
                mask=real_row[:, None] & inside[None, :],
                other=-1,
            )
            source = position_in(block, row, column[None, :], SIDE_BITS)
            grad = tl.load(
                grad_ptr + source[:, :, None] * channels + channel[None, None, :],
                mask=(block >= 0)[:, :, None] & real[None, None, :],
                other=0,
            ).to(ACCUMULATOR)
            tap = tap_row * KERNEL_COLUMNS + (KERNEL_COLUMNS - 1 - j)
            weight = tl.load(
                weight_ptr + tap[:, None] * channels + channel[None, :], mask=real_tap, other=0
            ).to(ACCUMULATOR)
            products = tl.fma(grad, weight[:, None, :], products)
            added = added + (tl.fma(grad, x[None, :, :], sums[j]),)  # type: ignore[assignment]
        sums = added
        grad_x = tl.reshape(pairwise_sum(products, 1, ROWS, LANES * CHANNELS), (LANES, CHANNELS))
        tl.store(grad_x_ptr + own, grad_x.to(grad_x_ptr.dtype.element_ty), mask=own_mask)

    part_ptr = parts_ptr + part * (ALL_TAPS + 1) * channels + channel
    for j in tl.static_range(KERNEL_COLUMNS):
        tap = tap_row * KERNEL_COLUMNS + (KERNEL_COLUMNS - 1 - j)
        total = pairwise_sum(sums[j], ROWS, LANES, CHANNELS)
        tl.store(part_ptr[None, :] + tap[:, None] * channels, total, mask=real_tap)
    total = tl.reshape(pairwise_sum(bias_sums, 1, LANES, CHANNELS), (CHANNELS,))
    tl.store(part_ptr + ALL_TAPS * channels, total, mask=real)


def launch(
    configuration: Configuration,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    neighbours: Tensor,
    dilation: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs one configuration; the same as `masked_conv2d_grads`."""
    blocks, square, channels = x.shape
    positions, kernel = blocks * square, weight.shape[2:]
    grad_x = x.new_empty(x.shape)
    per_part, sums = empty_parts(x, kernel)
    parts = sums.shape[0]
    if sums.numel() > 0:
        masked_conv2d_grads_kernel[(configuration.grid(CHANNELS=channels)[0] * parts,)](
            grad.contiguous(),
            x.contiguous(),
            weight.flatten(1).t().contiguous(),
            neighbours.contiguous(),
            grad_x,
            sums,
            positions,
            per_part,
            channels,
            *dilation,
            KERNEL_ROWS=kernel[0],
            KERNEL_COLUMNS=kernel[1],
            RADIUS=math.isqrt(neighbours.shape[1]) // 2,
            SIDE_BITS=side_bits(square),
            ACCUMULATOR=accumulator(x.dtype),
            LANES=LANES,
            ROWS=triton.next_power_of_2(kernel[0]),
            **configuration.options,
        )
    return grad_x, *add_parts(sums, kernel, x.dtype)


def masked_conv2d_grads(
    grad: Tensor, x: Tensor, weight: Tensor, neighbours: Tensor, dilation: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the depthwise `masked_conv2d` in `x`, weight and bias.

    Args:
        grad, x: `[T, s*s, C]`, of one dtype.
        weight: `[C, 1, kh, kw]`, kh and kw odd.
        neighbours: int32, from `BlockMask.neighbours`.
        dilation: of rows and of columns.

    Returns:
        `[T, s*s, C]`, `[C, 1, kh, kw]` and `[C]`, in the dtype of `x`.
    """
    problem = describe(x, weight.shape[2:])
    arguments = (grad, x, weight, neighbours, dilation)
    return tuning.run("masked_conv2d_grads", problem, CONFIGURATIONS, launch, arguments)
