// The packed rows of the blocks around every visible block: int32 [blocks, (2 * radius + 1)^2] in
// raster order, -1: hidden or outside the grid.
#pragma once

#include "neighbour_table.h"

namespace convmae::cuda {

// One entry for each thread. Visible blocks are in ascending order, so a neighbour's row is found
// by bisection; nothing has to be counted first. Launch: ceil(blocks * (2 * radius + 1)^2 / 256)
// thread blocks of 256 threads.
static __global__ void __launch_bounds__(256) neighbour_table_search(NeighbourTableParams p) {
  const int64_t side = 2 * p.radius + 1, i = int64_t(blockIdx.x) * 256 + threadIdx.x;
  const int64_t block = i / (side * side), entry = i % (side * side);
  if (block >= p.blocks) return;
  const int64_t index = p.block_index[block];
  const int64_t row = index / p.grid_columns % p.grid_rows + entry / side - p.radius;
  const int64_t column = index % p.grid_columns + entry % side - p.radius;
  int32_t found = -1;
  if (row >= 0 && row < p.grid_rows && column >= 0 && column < p.grid_columns) {
    const int64_t wanted =
        index + (entry / side - p.radius) * p.grid_columns + entry % side - p.radius;
    if (p.visible[wanted]) {
      int64_t low = 0, high = p.blocks;  // the first row whose block is not before the wanted one
      while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (p.block_index[middle] < wanted) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      found = int32_t(low);
    }
  }
  p.table[i] = found;
}

// Calls launch(kernel, grid, block, shared bytes, p).
template <class Launch>
void launch_neighbour_table(const NeighbourTableParams& p, Launch&& launch) {
  const int64_t side = 2 * p.radius + 1, entries = p.blocks * side * side;
  if (entries == 0) return;
  launch(neighbour_table_search, dim3(unsigned((entries + 255) / 256)), dim3(256), 0, p);
}

}  // namespace convmae::cuda
