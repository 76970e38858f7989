// Visible blocks of dense feature maps, any strides, to packed features [blocks, side * side,
// channels], the positions of a block in Z-order. Elements are only moved: E is any type of their
// size.
#pragma once

#include "block.h"
#include "cuda/rows.cuh"
#include "cuda/vec.cuh"
#include "gather_visible.h"

namespace convmae::cuda {

// The offset in `images`, in elements, of channel 0 of a packed position: block * side^2 + rank.
__device__ inline int64_t image_offset(const GatherVisibleParams& p, int64_t position) {
  const int log = log2_side(p.side);
  const int rank = int(position) & ((1 << 2 * log) - 1);
  const int64_t index = p.block_index[position >> 2 * log], grid = p.grid_rows * p.grid_columns;
  const int64_t image = index / grid, cell = index - image * grid;
  const int64_t cell_row = cell / p.grid_columns, cell_column = cell - cell_row * p.grid_columns;
  return image * p.stride_batch + ((cell_row << log) + zorder_row(rank)) * p.stride_row +
         ((cell_column << log) + zorder_column(rank)) * p.stride_column;
}

// Channels-last images: a position's channels are contiguous in both. E is as wide as alignment
// allows, up to a Chunk; `channels` and the strides of p are in units of E. Where a position lies
// is found once for all its channels. A thread has up to four positions in flight. Launch: grid
// ceil(positions / (4 * blockDim.y)), block (x, y) of 256 threads.
template <class E>
__global__ void __launch_bounds__(256) gather_visible_rows(GatherVisibleParams p) {
  __shared__ int64_t offsets[kMaxRows];  // -1: no such position
  const int64_t positions = p.blocks * p.side * p.side;
  const int rows = 4 * blockDim.y;
  const int64_t first = int64_t(blockIdx.x) * rows;
  for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < rows; i += 256) {
    offsets[i] = first + i < positions ? image_offset(p, first + i) : -1;
  }
  __syncthreads();
  for (int64_t c = threadIdx.x; c < p.channels; c += blockDim.x) {
    const E* const from = static_cast<const E*>(p.images) + c;
    E* const to = static_cast<E*>(p.y) + first * p.channels + c;
    E value[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = threadIdx.y + i * blockDim.y;
      if (offsets[row] != -1) value[i] = from[offsets[row]];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = threadIdx.y + i * blockDim.y;
      if (offsets[row] != -1) to[row * p.channels] = value[i];
    }
  }
}

// Any strides: 64 positions x 32 channels are turned in shared memory, read along the positions,
// which are neighbours in the image, and written along the channels.
// Launch: grid (ceil(positions / 64), ceil(channels / 32)), block 256.
template <class E>
__global__ void __launch_bounds__(256) gather_visible_turned(GatherVisibleParams p) {
  __shared__ E tile[32][65];
  const int64_t positions = p.blocks * p.side * p.side, first = int64_t(blockIdx.x) * 64;
  const int64_t first_channel = int64_t(blockIdx.y) * 32;
  const int count = int(min(int64_t(64), positions - first));
  const int channels = int(min(int64_t(32), p.channels - first_channel));
  const int column = threadIdx.x % 64;
  if (column < count) {
    const E* from = static_cast<const E*>(p.images) + image_offset(p, first + column) +
                    first_channel * p.stride_channel;
#pragma unroll 8
    for (int c = threadIdx.x / 64; c < channels; c += 4) {
      tile[c][column] = from[c * p.stride_channel];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count * channels; i += 256) {
    static_cast<E*>(p.y)[(first + i / channels) * p.channels + first_channel + i % channels] =
        tile[i % channels][i / channels];
  }
}

// Calls launch(kernel, grid, block, shared bytes, p) with the kernel for the layout of the images.
template <class Launch>
void launch_gather_visible(const GatherVisibleParams& p, Launch&& launch) {
  const int64_t positions = p.blocks * p.side * p.side;
  if (positions == 0 || p.channels == 0) return;
  with_size(p.element_size, [&](auto element) {
    using E = decltype(element);
    if (p.stride_channel != 1 && p.channels > 1) {
      return launch(gather_visible_turned<E>,
                    dim3(unsigned((positions + 63) / 64), unsigned((p.channels + 31) / 32)),
                    dim3(256), 0, p);
    }
    const auto rows = [&](auto unit, const GatherVisibleParams& q) {
      const dim3 block = block_of_rows(q.channels);
      launch(gather_visible_rows<decltype(unit)>, grid_of_rows(positions, block), block, 0, q);
    };
    constexpr int n = int(sizeof(Chunk) / sizeof(E));
    const auto whole = [](int64_t elements) { return elements % n == 0; };
    if (!whole(p.channels) || !whole(p.stride_batch) || !whole(p.stride_row) ||
        !whole(p.stride_column) || !is_aligned(p.images, sizeof(Chunk))) {
      return rows(E{}, p);
    }
    GatherVisibleParams q = p;
    q.channels /= n;
    q.stride_batch /= n;
    q.stride_row /= n;
    q.stride_column /= n;
    rows(Chunk{}, q);
  });
}

}  // namespace convmae::cuda
