// Packed features [blocks, side * side, channels], the positions of a block in Z-order, to dense
// channels-last feature maps [batch, height, width, channels]; every position is written, hidden
// ones with the fill value.
#pragma once

#include "block.h"
#include "cuda/rows.cuh"
#include "cuda/vec.cuh"
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

// E is as wide as alignment allows, up to a Chunk; `channels` of p is in units of E. Where a
// position comes from is found once for all its channels. A thread has up to four in flight.
// Launch: grid ceil(positions / (4 * blockDim.y)), block (x, y) of 256 threads.
template <class E>
__global__ void __launch_bounds__(256) scatter_visible_rows(ScatterVisibleParams p, E fill) {
  __shared__ int64_t offsets[kMaxRows];
  const int64_t positions = (p.batch * p.grid_rows * p.grid_columns) * p.side * p.side;
  const int rows = 4 * blockDim.y;
  const int64_t first = int64_t(blockIdx.x) * rows;
  for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < rows; i += 256) {
    offsets[i] = first + i < positions ? packed_offset(p, first + i) : -1;
  }
  __syncthreads();
  for (int64_t c = threadIdx.x; c < p.channels; c += blockDim.x) {
    const E* const from = static_cast<const E*>(p.x) + c;
    E* const to = static_cast<E*>(p.y) + first * p.channels + c;
    E value[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = threadIdx.y + i * blockDim.y;
      value[i] = offsets[row] != -1 ? from[offsets[row]] : fill;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = threadIdx.y + i * blockDim.y;
      if (first + row < positions) to[row * p.channels] = value[i];
    }
  }
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
  with_size(p.element_size, [&](auto element) {
    using E = decltype(element);
    const auto write = [&](auto fill, const ScatterVisibleParams& q) {
      const dim3 block = block_of_rows(q.channels);
      launch(scatter_visible_rows<decltype(fill)>, grid_of_rows(positions, block), block, 0, q,
             fill);
    };
    constexpr int n = int(sizeof(Chunk) / sizeof(E));
    std::memcpy(&element, p.fill, sizeof(E));
    if (p.channels % n != 0 || !is_aligned(p.x, sizeof(Chunk))) return write(element, p);
    Chunk fill;
    for (int i = 0; i < n; ++i) {
      std::memcpy(reinterpret_cast<char*>(&fill) + i * sizeof(E), &element, sizeof(E));
    }
    ScatterVisibleParams q = p;
    q.channels /= n;
    write(fill, q);
  });
}

}  // namespace convmae::cuda
