// The gradient of gather_windows: windows [blocks, rows, columns, channels], in raster order, to
// packed features [blocks, side * side, channels], the positions of a block in Z-order.
#pragma once

#include "block.h"
#include "cuda/rows.cuh"
#include "cuda/vec.cuh"
#include "gather_windows.h"

namespace convmae::cuda {

// Along one axis, the neighbours from `first` to `last`, in blocks from a position's own: those
// whose windows reach the position. The windows begin `before` positions before their blocks. All
// are in the neighbour table, because a halo that goes beyond it is refused.
struct Holders {
  int first, last;
};

__device__ inline Holders holders(int position, int before, int positions, int log) {
  return {-((positions - 1 - before - position) >> log), (position + before) >> log};
}

// A thread adds, for V channels of one position, what the windows of all neighbours hold of it, in
// the order of the neighbour table; two windows are read at a time. `channels` of p is in units of
// V. Launch: grid ceil(positions / blockDim.y), block_of_rows.
template <class T, int V>
__global__ void __launch_bounds__(256) gather_windows_grad_rows(GatherWindowsParams p) {
  constexpr int kBatch = 2;
  const int log = log2_side(p.side), n = 2 * p.radius + 1;
  const int64_t position = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t block = position >> 2 * log;
  if (block >= p.blocks) return;
  const int rank = int(position) & ((1 << 2 * log) - 1);
  const int row = zorder_row(rank), column = zorder_column(rank);
  const Holders rows = holders(row, p.top, p.rows, log);
  const Holders columns = holders(column, p.left, p.columns, log);
  const int32_t* const own = p.neighbours + (block * n + p.radius) * n + p.radius;
  const int positions = p.rows * p.columns;                       // of a window
  const int place = (row + p.top) * p.columns + column + p.left;  // in the window of its own block
  for (int64_t c = threadIdx.x; c < p.channels; c += blockDim.x) {
    const Values<T, V>* const from = static_cast<const Values<T, V>*>(p.from) + c;
    Acc<T> sum[V] = {};
    int i = columns.first <= columns.last ? rows.first : rows.last + 1, j = columns.first;
#pragma unroll 1  // few windows reach a position; the registers serve more warps
    while (i <= rows.last) {
      int64_t at[kBatch];  // -1: hidden
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const bool exists = i <= rows.last;
        const int32_t window = own[exists ? i * n + j : 0];
        const int shift = (i * p.columns + j) * p.side;
        at[k] = exists && window >= 0 ? int64_t(window) * positions + (place - shift) : -1;
        if (++j > columns.last) j = columns.first, ++i;
      }
      Values<T, V> x[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        if (at[k] >= 0) x[k] = from[at[k] * p.channels];
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        if (at[k] < 0) continue;
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += load(&x[k].value[v]);
      }
    }
    Values<T, V> y;
#pragma unroll
    for (int v = 0; v < V; ++v) store(sum[v], &y.value[v]);
    static_cast<Values<T, V>*>(p.to)[position * p.channels + c] = y;
  }
}

// Calls launch(kernel, grid, block, shared bytes, arguments...).
template <class Launch>
void launch_gather_windows_grad(const GatherWindowsParams& p, Launch&& launch) {
  const int64_t positions = p.blocks * p.side * p.side;
  if (positions == 0 || p.channels == 0) return;
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    const auto rows = [&](auto kernel, int64_t channels) {
      GatherWindowsParams q = p;
      q.channels = channels;
      const dim3 block = block_of_rows(channels);
      launch(kernel, dim3(unsigned((positions + block.y - 1) / block.y)), block, 0, q);
    };
    constexpr int n = int(sizeof(Chunk) / sizeof(T));
    if (p.channels % n == 0 && is_aligned(p.from, sizeof(Chunk))) {
      rows(gather_windows_grad_rows<T, n>, p.channels / n);
    } else {
      rows(gather_windows_grad_rows<T, 1>, p.channels);
    }
  });
}

}  // namespace convmae::cuda
