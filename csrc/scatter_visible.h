// Packed features back to dense feature maps: parameters and launches.
#pragma once

#include <cstdint>

#include "launch.h"

namespace convmae {

// x: [blocks, side * side, channels]; y: [batch, grid_rows * side, grid_columns * side, channels].
struct ScatterVisibleParams {
  const void* x;
  const int64_t* row_of_block;  // [batch * grid_rows * grid_columns], -1: hidden
  void* y;
  const void* fill;  // one element, on the host
  int64_t batch, channels, grid_rows, grid_columns;
  int side, element_size;
};

// row_of_block[block_index[row]] = row, for `blocks` rows.
struct ScatterVisibleRows {
  const int64_t* block_index;
  int64_t* row_of_block;
  int64_t blocks;
};

namespace cpu {
// Lines are rows of positions, batch * grid_rows * side of them.
void scatter_visible(const ScatterVisibleParams& p, int64_t begin, int64_t end);
}  // namespace cpu
namespace cuda {
LaunchError scatter_visible(const ScatterVisibleRows& rows, const ScatterVisibleParams& p,
                            Stream stream);
}
}  // namespace convmae
