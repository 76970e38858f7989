"""Which part of the packed features a program works on."""

import triton
import triton.language as tl

from convmae_kernels.triton.zorder import spread


@triton.jit
def tile_of_program(channels, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr):
    """The positions (int64) and the channels of a program's tile; some may lie beyond the last.

    The first programs take all channels of the first positions, the next ones those of the next
    positions; `Configuration.grid` says how many programs there are.
    """
    tiles = tl.cdiv(channels, CHANNELS)
    pid = tl.program_id(0)
    position = (pid // tiles).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    channel = (pid % tiles) * CHANNELS + tl.arange(0, CHANNELS)
    return position, channel


@triton.jit
def position_in(block, row, column, SIDE_BITS: tl.constexpr):
    """Where a position of a block lies among all positions (int64); negative where hidden.

    `row` and `column` may count from another block: their lowest `SIDE_BITS` bits say which it is.
    """
    first = block.to(tl.int64) << (2 * SIDE_BITS)
    LAST: tl.constexpr = (1 << SIDE_BITS) - 1
    return first + ((spread(row & LAST, SIDE_BITS) << 1) | spread(column & LAST, SIDE_BITS))
