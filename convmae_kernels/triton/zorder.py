"""Z-order in kernels: from the rank of a position in its block to row and column, and back."""

import triton
import triton.language as tl


@triton.jit
def spread(x, BITS: tl.constexpr):
    """The lowest `BITS` bits of `x` with a zero before each: `ab -> 0a0b`."""
    spread = x & 0
    for bit in tl.static_range(BITS):
        spread |= ((x >> bit) & 1) << (2 * bit)
    return spread


@triton.jit
def compact(x, BITS: tl.constexpr):
    """The inverse of `spread`: the bits of `x` at even places, `0a0b -> ab`."""
    compact = x & 0
    for bit in tl.static_range(BITS):
        compact |= ((x >> (2 * bit)) & 1) << bit
    return compact


def side_bits(positions: int) -> int:
    """`log2(s)` of a block of `s * s` positions."""
    return (positions.bit_length() - 1) // 2
