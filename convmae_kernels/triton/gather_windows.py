"""`gather_windows` in Triton."""

import math

import triton
import triton.language as tl
from torch import Tensor

from convmae_kernels.triton import tuning
from convmae_kernels.triton.tile import tile_of_program
from convmae_kernels.triton.tuning import Configuration
from convmae_kernels.triton.zorder import side_bits, spread

CONFIGURATIONS = (
    Configuration("wide", {"POSITIONS": 8, "CHANNELS": 128}, num_warps=4),
    Configuration("square", {"POSITIONS": 32, "CHANNELS": 32}, num_warps=4),
    Configuration("large", {"POSITIONS": 32, "CHANNELS": 128}, num_warps=8),
    Configuration("tall", {"POSITIONS": 256, "CHANNELS": 4}, num_warps=4),
)


@triton.jit(do_not_specialize=["positions"])
def gather_windows_kernel(
    x_ptr,  # [T, s*s, C]
    neighbours_ptr,  # int32 [T, (2 * RADIUS + 1) ** 2]
    fill_ptr,  # [1]
    windows_ptr,  # [T, ROWS, COLUMNS, C]
    positions,  # T * ROWS * COLUMNS
    channels,
    top,
    left,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RADIUS: tl.constexpr,
    SIDE_BITS: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    position, channel = tile_of_program(channels, POSITIONS, CHANNELS)
    inside, real = position < positions, channel < channels

    SIDE: tl.constexpr = 1 << SIDE_BITS
    TABLE_SIDE: tl.constexpr = 2 * RADIUS + 1
    window = position // (ROWS * COLUMNS)
    place = (position % (ROWS * COLUMNS)).to(tl.int32)
    # Row and column among the block and its neighbours.
    row = place // COLUMNS + RADIUS * SIDE - top
    column = place % COLUMNS + RADIUS * SIDE - left
    table_ptr = neighbours_ptr + window * (TABLE_SIDE * TABLE_SIDE)
    neighbour = (row >> SIDE_BITS) * TABLE_SIDE + (column >> SIDE_BITS)
    block = tl.load(table_ptr + neighbour, mask=inside, other=-1)
    rank = spread(row & (SIDE - 1), SIDE_BITS) << 1 | spread(column & (SIDE - 1), SIDE_BITS)
    source = (block.to(tl.int64) << (2 * SIDE_BITS)) + rank

    values = tl.load(
        x_ptr + source[:, None] * channels + channel[None, :],
        mask=(block >= 0)[:, None] & real[None, :],
        other=tl.load(fill_ptr),
    )
    tl.store(
        windows_ptr + position[:, None] * channels + channel[None, :],
        values,
        mask=inside[:, None] & real[None, :],
    )


def launch(
    configuration: Configuration, x: Tensor, neighbours: Tensor, halo: list[int], fill: float
) -> tuple[Tensor]:
    """Runs one configuration; the same as `gather_windows`."""
    blocks, square, channels = x.shape
    side, (top, bottom, left, right) = math.isqrt(square), halo
    rows, columns = top + side + bottom, left + side + right
    windows = x.new_empty(blocks, rows, columns, channels)
    if windows.numel() > 0:
        positions = blocks * rows * columns
        gather_windows_kernel[configuration.grid(POSITIONS=positions, CHANNELS=channels)](
            x.contiguous(),
            neighbours.contiguous(),
            x.new_full((1,), fill),
            windows,
            positions,
            channels,
            top,
            left,
            ROWS=rows,
            COLUMNS=columns,
            RADIUS=math.isqrt(neighbours.shape[1]) // 2,
            SIDE_BITS=side_bits(square),
            **configuration.options,
        )
    return (windows,)


def gather_windows(x: Tensor, neighbours: Tensor, halo: list[int], fill: float) -> Tensor:
    """`[T, s*s, C] -> [T, top + s + bottom, left + s + right, C]`, see `reference`."""
    side, halo = math.isqrt(x.shape[1]), list(halo)
    problem = f"halo {halo}, side {side}, {x.shape[2]} channels, {x.dtype}"
    arguments = (x, neighbours, halo, fill)
    (windows,) = tuning.run("gather_windows", problem, CONFIGURATIONS, launch, arguments)
    return windows
