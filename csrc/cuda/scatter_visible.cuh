// Packed features [blocks, side * side, channels], the positions of a block in Z-order, to dense
// channels-last feature maps [batch, height, width, channels]; every position is written, hidden
// ones with the fill value.
#pragma once

#include "block.h"
#include "cuda/rows.cuh"
#include "scatter_visible.h"

namespace convmae::cuda {

// row_of_block[block_index[row]] = row; the other entries are -1 already.
// Launch: ceil(blocks / 256) thread blocks of 256 threads.
static __global__ void __launch_bounds__(256) number_rows(ScatterVisibleRows p) {
  const int64_t row = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (row < p.blocks) p.row_of_block[p.block_index[row]] = row;
}

// The offset in x, in elements, of channel 0 of a dense position; -1: it is hidden.
__device__ inline int64_t packed_offset(const ScatterVisibleParams& p, int64_t position) {
  const int log = log2_side(p.side), last = p.side - 1;
  const int64_t width = p.grid_columns << log, line = position / width;  // of all images
  const int row = int(line) & last, column = int(position - line * width) & last;
  const int64_t cell = (line >> log) * p.grid_columns + ((position - line * width) >> log);
  const int64_t packed = p.row_of_block[cell];
  return packed < 0 ? -1 : ((packed << 2 * log) + zorder(row, column)) * p.channels;
}

// `channels` of p is in units of E. Launch: grid_of_rows, block_of_rows.
template <class E>
__global__ void __launch_bounds__(256) scatter_visible_rows(ScatterVisibleParams p, E fill) {
  const int64_t positions = (p.batch * p.grid_rows * p.grid_columns) * p.side * p.side;
  write_rows(p.x, p.y, positions, p.channels, fill,
             [&](int64_t position) { return packed_offset(p, position); });
}

// Calls launch(kernel, grid, block, shared bytes, arguments...), for the rows and for the features.
template <class Launch>
void launch_scatter_visible(const ScatterVisibleRows& rows, const ScatterVisibleParams& p,
                            Launch&& launch) {
  const int64_t positions = p.batch * p.grid_rows * p.grid_columns * p.side * p.side;
  if (positions == 0 || p.channels == 0) return;
  if (rows.blocks > 0) {
    launch(number_rows, dim3(unsigned((rows.blocks + 255) / 256)), dim3(256), 0, rows);
  }
  with_unit(p.element_size, p.fill, p.x, p.channels, [&](auto fill, int64_t channels) {
    ScatterVisibleParams q = p;
    q.channels = channels;
    const dim3 block = block_of_rows(channels);
    launch(scatter_visible_rows<decltype(fill)>, grid_of_rows(positions, block), block, 0, q, fill);
  });
}

}  // namespace convmae::cuda
