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

// E is as wide as alignment allows, up to a Chunk; `channels` of p is in units of E and p.fill
// holds one E. A thread has up to four positions in flight.
// Launch: grid ceil(positions / (4 * blockDim.y)), block (x, y) of 256 threads.
template <class E>
__global__ void __launch_bounds__(256) scatter_visible_rows(ScatterVisibleParams p, E fill) {
  const int64_t width = p.grid_columns * p.side, height = p.grid_rows * p.side;
  const int64_t positions = p.batch * height * width;
  const int64_t first = int64_t(blockIdx.x) * 4 * blockDim.y + threadIdx.y;
  const E* from[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t position = first + i * blockDim.y;
    from[i] = nullptr;
    if (position >= positions) continue;
    const int64_t line = position / width, column = position % width, row = line % height;
    const int64_t block =
        (line / height * p.grid_rows + row / p.side) * p.grid_columns + column / p.side;
    const int64_t packed = p.row_of_block[block];
    if (packed < 0) continue;
    from[i] =
        static_cast<const E*>(p.x) +
        (packed * p.side * p.side + zorder(int(row % p.side), int(column % p.side))) * p.channels;
  }
  for (int64_t c = threadIdx.x; c < p.channels; c += blockDim.x) {
    E value[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) value[i] = from[i] != nullptr ? from[i][c] : fill;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t position = first + i * blockDim.y;
      if (position < positions) static_cast<E*>(p.y)[position * p.channels + c] = value[i];
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
