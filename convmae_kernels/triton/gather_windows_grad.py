"""`gather_windows_grad` in Triton."""

import math

import triton
import triton.language as tl
from torch import Tensor

from convmae_kernels.triton import tuning
from convmae_kernels.triton.accumulation import accumulator
from convmae_kernels.triton.tile import tile_of_program
from convmae_kernels.triton.tuning import Configuration
from convmae_kernels.triton.zorder import compact, side_bits

CONFIGURATIONS = (
    Configuration("wide", {"POSITIONS": 8, "CHANNELS": 128}, num_warps=4),
    Configuration("square", {"POSITIONS": 32, "CHANNELS": 32}, num_warps=4),
    Configuration("large", {"POSITIONS": 32, "CHANNELS": 128}, num_warps=8),
    Configuration("tall", {"POSITIONS": 256, "CHANNELS": 4}, num_warps=4),
)


@triton.jit(do_not_specialize=["positions"])
def gather_windows_grad_kernel(
    windows_ptr,  # [T, rows, columns, C]
    neighbours_ptr,  # int32 [T, (2 * RADIUS + 1) ** 2]
    grad_ptr,  # [T, s*s, C]
    positions,  # T * s*s
    channels,
    top,
    left,
    rows,
    columns,
    RADIUS: tl.constexpr,
    SIDE_BITS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    position, channel = tile_of_program(channels, POSITIONS, CHANNELS)
    inside, real = position < positions, channel < channels

    SIDE: tl.constexpr = 1 << SIDE_BITS
    TABLE_SIDE: tl.constexpr = 2 * RADIUS + 1
    rank = (position & (SIDE * SIDE - 1)).to(tl.int32)
    # Row and column in the window of the first neighbour, RADIUS blocks up and left.
    first_row = compact(rank >> 1, SIDE_BITS) + RADIUS * SIDE + top
    first_column = compact(rank, SIDE_BITS) + RADIUS * SIDE + left
    table_ptr = neighbours_ptr + (position >> (2 * SIDE_BITS)) * (TABLE_SIDE * TABLE_SIDE)

    # Each sum is made in the order of the table, whatever the tile.
    sums = tl.zeros([POSITIONS, CHANNELS], ACCUMULATOR)
    for i in range(TABLE_SIDE):
        row = first_row - i * SIDE
        meets_row = inside & (row >= 0) & (row < rows)
        # Few at a time: a table may be wide where blocks are small.
        for j in tl.range(0, TABLE_SIDE, loop_unroll_factor=3):
            column = first_column - j * SIDE
            meets = meets_row & (column >= 0) & (column < columns)
            window = tl.load(table_ptr + i * TABLE_SIDE + j, mask=meets, other=-1)
            source = window.to(tl.int64) * (rows * columns) + row * columns + column
            sums += tl.load(
                windows_ptr + source[:, None] * channels + channel[None, :],
                mask=(window >= 0)[:, None] & real[None, :],
                other=0,
            ).to(ACCUMULATOR)
    tl.store(
        grad_ptr + position[:, None] * channels + channel[None, :],
        sums.to(grad_ptr.dtype.element_ty),
        mask=inside[:, None] & real[None, :],
    )


def launch(
    configuration: Configuration, grad: Tensor, neighbours: Tensor, halo: list[int]
) -> tuple[Tensor]:
    """Runs one configuration; the same as `gather_windows_grad`."""
    blocks, rows, columns, channels = grad.shape
    top, bottom, left, _ = halo
    square = (rows - top - bottom) ** 2
    y = grad.new_empty(blocks, square, channels)
    if y.numel() > 0:
        positions = blocks * square
        gather_windows_grad_kernel[configuration.grid(POSITIONS=positions, CHANNELS=channels)](
            grad.contiguous(),
            neighbours.contiguous(),
            y,
            positions,
            channels,
            top,
            left,
            rows,
            columns,
            RADIUS=math.isqrt(neighbours.shape[1]) // 2,
            SIDE_BITS=side_bits(square),
            ACCUMULATOR=accumulator(grad.dtype),
            **configuration.options,
        )
    return (y,)


def gather_windows_grad(grad: Tensor, neighbours: Tensor, halo: list[int]) -> Tensor:
    """`[T, rows, columns, C] -> [T, s*s, C]`, see `reference.gather_windows_grad`."""
    halo = list(halo)
    side = grad.shape[1] - halo[0] - halo[1]
    problem = f"halo {halo}, side {side}, {grad.shape[3]} channels, {grad.dtype}"
    arguments = (grad, neighbours, halo)
    (y,) = tuning.run("gather_windows_grad", problem, CONFIGURATIONS, launch, arguments)
    return y
