// The neighbour table of a mask: parameters and launches.
#pragma once

#include <cstdint>

#include "launch.h"

namespace convmae {

struct NeighbourTableParams {
  const bool* visible;         // [batch, grid_rows, grid_columns]
  const int64_t* block_index;  // [blocks], the flat indices of the visible ones, ascending
  int32_t* table;              // [blocks, (2 * radius + 1)^2]
  int64_t blocks, grid_rows, grid_columns, radius;
};

namespace cuda {
LaunchError neighbour_table(const NeighbourTableParams& p, Stream stream);
}
}  // namespace convmae
