// Visible blocks of dense feature maps to packed features: parameters and launches.
#pragma once

#include <cstdint>

#include "launch.h"

namespace convmae {

// images: [batch, channels, grid_rows * side, grid_columns * side], strides in elements;
// y: [blocks, side * side, channels], contiguous.
struct GatherVisibleParams {
  const void* images;
  const int64_t* block_index;  // [blocks], into batch * grid_rows * grid_columns
  void* y;
  int64_t blocks, channels, grid_rows, grid_columns;
  int64_t stride_batch, stride_channel, stride_row, stride_column;
  int side, element_size;
};

namespace cpu {
void gather_visible(const GatherVisibleParams& p, int64_t begin, int64_t end);
}
namespace cuda {
LaunchError gather_visible(const GatherVisibleParams& p, Stream stream);
}
}  // namespace convmae
