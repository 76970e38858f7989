// Packed features [blocks, side * side, channels], the positions of a block in Z-order, to windows
// [blocks, rows, columns, channels], in raster order.
#pragma once

#include "block.h"
#include "cuda/rows.cuh"
#include "cuda/vec.cuh"
#include "gather_windows.h"

namespace convmae::cuda {

// The offset in the packed features, in units of `channels`, of channel 0 of a position of the
// windows; -1: it is hidden.
__device__ inline int64_t packed_offset(const GatherWindowsParams& p, int64_t position) {
  const int64_t line = position / p.columns, block = line / p.rows;
  const int row = int(line - block * p.rows) - p.top;
  const int column = int(position - line * p.columns) - p.left;
  const Place at = place(row, column, p.side, p.radius);
  const int n = 2 * p.radius + 1;
  const int64_t packed = p.neighbours[block * n * n + at.neighbour];
  return packed < 0 ? -1 : ((packed << 2 * log2_side(p.side)) + at.rank) * p.channels;
}

// `channels` of p is in units of E. Launch: grid_of_rows, block_of_rows.
template <class E>
__global__ void __launch_bounds__(256) gather_windows_rows(GatherWindowsParams p, E fill) {
  write_rows(p.from, p.to, p.blocks * p.rows * p.columns, p.channels, fill,
             [&](int64_t position) { return packed_offset(p, position); });
}

// Calls launch(kernel, grid, block, shared bytes, arguments...).
template <class Launch>
void launch_gather_windows(const GatherWindowsParams& p, Launch&& launch) {
  const int64_t positions = p.blocks * p.rows * p.columns;
  if (positions == 0 || p.channels == 0) return;
  with_unit(size_of(p.dtype), p.fill, p.from, p.channels, [&](auto fill, int64_t channels) {
    GatherWindowsParams q = p;
    q.channels = channels;
    const dim3 block = block_of_rows(channels);
    launch(gather_windows_rows<decltype(fill)>, grid_of_rows(positions, block), block, 0, q, fill);
  });
}

}  // namespace convmae::cuda
