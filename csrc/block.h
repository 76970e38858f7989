// Where a position lies in a block, and which neighbour a position of its surroundings belongs to.
// For host and device alike; no torch.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define CONVMAE_HD __host__ __device__
#else
#define CONVMAE_HD
#endif

namespace convmae {

// The rank of a position in Z-order: the bits of row and column alternate, the row's first.
// Block sides are at most 32, so five bits of each.
CONVMAE_HD static constexpr int zorder(int row, int column) {
  int rank = 0;
  for (int bit = 0; bit < 5; ++bit) {
    rank |= ((row >> bit) & 1) << (2 * bit + 1) | ((column >> bit) & 1) << (2 * bit);
  }
  return rank;
}

// The column of the position of this rank; `zorder_row` is its row.
CONVMAE_HD static constexpr int zorder_column(int rank) {
  int column = 0;
  for (int bit = 0; bit < 5; ++bit) column |= ((rank >> 2 * bit) & 1) << bit;
  return column;
}
CONVMAE_HD static constexpr int zorder_row(int rank) { return zorder_column(rank >> 1); }

// The exponent of a block side, which is a power of two.
CONVMAE_HD static constexpr int log2_side(int side) {
  return (side >= 2) + (side >= 4) + (side >= 8) + (side >= 16) + (side >= 32);
}

// A position `row`, `column` relative to a block's first one (negative and beyond the block's side
// too): the column of the neighbour table that holds its block, and its rank in that block.
struct Place {
  int32_t neighbour;
  int32_t rank;
};

CONVMAE_HD static inline Place place(int row, int column, int side, int radius) {
  const int log = log2_side(side), last = side - 1;
  const int shifted_row = row + radius * side, shifted_column = column + radius * side;
  return {(shifted_row >> log) * (2 * radius + 1) + (shifted_column >> log),
          zorder(shifted_row & last, shifted_column & last)};
}

}  // namespace convmae
