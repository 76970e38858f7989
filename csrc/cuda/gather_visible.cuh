// Visible blocks of dense feature maps, any strides, to packed features [blocks, side * side,
// channels], the positions of a block in Z-order. Elements are only moved: E is any type of their
// size.
#pragma once

#include "block.h"
#include "cuda/rows.cuh"
#include "cuda/vec.cuh"
#include "gather_visible.h"
#include "unroll.h"

namespace convmae::cuda {

// Divides numbers below 2^63 with a multiplication: ceil(2^(64 + shift) / divisor) needs 65 bits,
// of which `multiplier` holds the lower 64.
struct Divisor {
  uint64_t multiplier;
  int shift;

  explicit Divisor(uint64_t divisor) : shift(0) {
    while (uint64_t(1) << shift < divisor) ++shift;
    const auto rest = static_cast<unsigned __int128>((uint64_t(1) << shift) - divisor);
    multiplier = uint64_t((rest << 64) / divisor + 1);
  }
  __device__ uint64_t divide(uint64_t x) const {
    return (high_product(x, multiplier) + x) >> shift;
  }
};

// How blocks are found: a grid of an image, a line of a grid.
struct GatherVisibleBlocks : GatherVisibleParams {
  Divisor by_grid, by_columns;

  explicit GatherVisibleBlocks(const GatherVisibleParams& p)
      : GatherVisibleParams(p),
        by_grid(uint64_t(p.grid_rows) * uint64_t(p.grid_columns)),
        by_columns(uint64_t(p.grid_columns)) {}
};

// The offset in `images`, in elements, of channel 0 of a packed position: block * side^2 + rank.
__device__ inline int64_t image_offset(const GatherVisibleBlocks& p, int64_t position) {
  const int log = log2_side(p.side);
  const int rank = int(position) & ((1 << 2 * log) - 1);
  const int64_t index = p.block_index[position >> 2 * log];
  const int64_t image = p.by_grid.divide(index);
  const int64_t cell = index - image * (p.grid_rows * p.grid_columns);
  const int64_t row = p.by_columns.divide(cell), column = cell - row * p.grid_columns;
  return image * p.stride_batch + ((row << log) + zorder_row(rank)) * p.stride_row +
         ((column << log) + zorder_column(rank)) * p.stride_column;
}

// Channels-last images: a position's channels are contiguous in both. E is as wide as alignment
// allows, up to a Chunk; `channels` and the strides of p are in units of E. Where a position lies
// is found once for all its channels. A thread has up to four positions in flight. Launch: grid
// ceil(positions / (4 * blockDim.y)), block (x, y) of 256 threads.
template <class E>
__global__ void __launch_bounds__(256) gather_visible_rows(GatherVisibleBlocks p) {
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

// Any strides: P positions x 2048 / P channels are turned in shared memory, read along the
// positions, which are neighbours in the image, and written along the channels. Launch: grid
// (ceil(positions / P), ceil(channels / (2048 / P))), block 256.
template <class E, int P>
__global__ void __launch_bounds__(256) gather_visible_turned(GatherVisibleBlocks p) {
  constexpr int kChannels = 2048 / P;
  __shared__ E tile[kChannels][P + 1];
  const int64_t positions = p.blocks * p.side * p.side, first = int64_t(blockIdx.x) * P;
  const int64_t first_channel = int64_t(blockIdx.y) * kChannels;
  const int count = int(min(int64_t(P), positions - first));
  const int channels = int(min(int64_t(kChannels), p.channels - first_channel));
  const int column = threadIdx.x % P;
  if (column < count) {
    const E* from = static_cast<const E*>(p.images) + image_offset(p, first + column) +
                    first_channel * p.stride_channel;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int c = threadIdx.x / P + i * (256 / P);
      if (c < channels) tile[c][column] = from[c * p.stride_channel];
    }
  }
  __syncthreads();
  // A thread's next element is the 256th after its last one.
  const int positions_further = 256u / unsigned(channels);
  const int channels_further = 256 - positions_further * channels;
  int position = threadIdx.x / unsigned(channels), channel = threadIdx.x - position * channels;
  E* const to = static_cast<E*>(p.y) + first * p.channels + first_channel;
  while (position < count) {
    to[position * p.channels + channel] = tile[channel][position];
    position += positions_further;
    channel += channels_further;
    if (channel >= channels) {
      channel -= channels;
      ++position;
    }
  }
}

// Calls launch(kernel, grid, block, shared bytes, p) with the kernel for the layout of the images.
template <class Launch>
void launch_gather_visible(const GatherVisibleParams& p, Launch&& launch) {
  const int64_t positions = p.blocks * p.side * p.side;
  if (positions == 0 || p.channels == 0) return;
  with_size(p.element_size, [&](auto element) {
    using E = decltype(element);
    const auto turned = [&](auto tile) {
      constexpr int P = tile, kChannels = 2048 / P;
      const dim3 grid(unsigned((positions + P - 1) / P),
                      unsigned((p.channels + kChannels - 1) / kChannels));
      launch(gather_visible_turned<E, P>, grid, dim3(256), 0, GatherVisibleBlocks(p));
    };
    if (p.stride_channel != 1 && p.channels > 1) {
      return p.channels <= 8 ? turned(Index<256>{}) : turned(Index<64>{});
    }
    const auto rows = [&](auto unit, const GatherVisibleParams& q) {
      const dim3 block = block_of_rows(q.channels);
      launch(gather_visible_rows<decltype(unit)>, grid_of_rows(positions, block), block, 0,
             GatherVisibleBlocks(q));
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
