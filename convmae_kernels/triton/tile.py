"""Which part of the packed features a program works on."""

import triton
import triton.language as tl


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
