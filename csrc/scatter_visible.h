// Packed features back to dense feature maps: parameters and launches.
#pragma once

#include <cstdint>

namespace convmae {

// x: [blocks, side * side, channels]; y: [batch, grid_rows * side, grid_columns * side, channels].
struct ScatterVisibleParams {
  const void* x;
  const int64_t* row_of_block;  // [batch * grid_rows * grid_columns], -1: hidden
  void* y;
  const void* fill;  // one element
  int64_t channels, grid_rows, grid_columns;
  int side, element_size;
};

namespace cpu {
void scatter_visible(const ScatterVisibleParams& p, int64_t begin, int64_t end);
}
}  // namespace convmae
