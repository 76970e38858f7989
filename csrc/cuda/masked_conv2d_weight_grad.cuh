// Gradients of the depthwise convolution in its weight and bias, in two stages: every run of tiles
// (or blocks) writes its share, and the shares are added up in a fixed order. How many runs there
// are depends on the problem only, so the same input gives the same bits on every device.
#pragma once

#include "cuda/tile_kernels.cuh"

namespace convmae::cuda {

// A square kernel of dilation 1 on blocks of side S or, for S = 4, larger. The warps of a thread
// block take parts of its run. A lane keeps the sums of its channels in registers for the whole
// part; at the end those of all warps are added up.
// Launch: grid (p.slices, p.runs), block (32, kReducingWarps<S, K>). Needs words: channels *
// sizeof(T) a multiple of 4, x and grad aligned to 4 bytes, to 16 where p.wide.
template <class T, int S, int K>
__global__ void __launch_bounds__(32 * kReducingWarps<S, K>)
    masked_conv2d_weight_grad_tiles(MaskedConv2dWeightGrad p) {
  constexpr int V = kWordChannels<T>, kPlaces = Surroundings<S, K>::kPlaces;
  constexpr int kWarps = kReducingWarps<S, K>, kRows = 1 + K * K;
  __shared__ TileMemory<S, K, S * S> memories[kWarps];
  const int64_t slice = blockIdx.x, run = blockIdx.y;
  const int warp = __shfl_sync(0xffffffffu, int(threadIdx.y), 0);  // so that all lanes agree
  TileMemory<S, K, S * S>& memory = memories[warp];
  const Lane lane(threadIdx.x, int(slice), uint32_t(p.channels * sizeof(T)), p.wide);
  const char* const grads = lane.of(p.grad);
  const uint32_t* const words = lane.words(memory.places[0]);
  float bias[V] = {}, sum[K * K][V] = {};

  const int64_t begin = run * p.tiles_per_run, end = min(begin + p.tiles_per_run, p.tiles);
  const int64_t part = (p.tiles_per_run + kWarps - 1) / kWarps;
  const int64_t first = begin + warp * part, last = min(first + part, end);
  walk_tiles<S, K>(
      p, p.x, lane, int32_t(first), int32_t(last), 1, memory,
      [&](int32_t tile, Chunk* places)
          CONVMAE_INLINE_LAMBDA { copy_tile<S>(lane, grads, tile, places); },
      [](const Chunk*) CONVMAE_INLINE_LAMBDA {},
      [&](int32_t, uint32_t visible, uint32_t at) CONVMAE_INLINE_LAMBDA {
        float grad[S * S][V];
        load_tile<T, S>(words + (at + kPlaces * 8) * 4, grad);
#pragma unroll
        for (int o = 0; o < S * S; ++o) {
#pragma unroll
          for (int v = 0; v < V; ++v) bias[v] += grad[o][v];
        }
        const CopiedWindow<S, K> window{words + at * 4};
        for_visible<T, S, K>(visible, window,
                             [&](int y, int x, const float (&values)[V]) CONVMAE_INLINE_LAMBDA {
                               for_outputs<S, K>(y, x, [&](int o, int tap) CONVMAE_INLINE_LAMBDA {
#pragma unroll
                                 for (int v = 0; v < V; ++v) sum[tap][v] += grad[o][v] * values[v];
                               });
                             });
      });

  const int64_t start = slice * kWarpChannels<T>;  // the first channel
  float* const out = static_cast<float*>(p.partial) + run * kRows * p.channels + start;
  store_share<T, K, kWarps>(lane, warp, start, p.channels, memories, bias, sum, out);
}

// Any kernel, dilation, block side, alignment, dtype. A thread sums one tap, or the bias, of one
// channel over a run of blocks, 64 positions at a time: one chain of additions over thousands of
// positions rounds ten times as badly.
// Launch: grid (p.runs, ceil(channels / 32), ceil((1 + taps) / 8)), block (32, 8).
template <class T>
__global__ void __launch_bounds__(256) masked_conv2d_weight_grad_any(MaskedConv2dWeightGrad p) {
  using A = Acc<T>;
  const int64_t channel = int64_t(blockIdx.y) * 32 + threadIdx.x;
  const int row = int(blockIdx.z) * 8 + int(threadIdx.y);  // of partial: 0 the bias, 1 + tap
  if (channel >= p.channels || row > p.kernel_rows * p.kernel_columns) return;
  const int down = ((row - 1) / p.kernel_columns - p.kernel_rows / 2) * p.dilation_rows;
  const int right = ((row - 1) % p.kernel_columns - p.kernel_columns / 2) * p.dilation_columns;
  const int positions = p.side * p.side;
  const int64_t run = blockIdx.x, first = run * p.tiles_per_run;
  const int64_t last = min(first + p.tiles_per_run, p.blocks);

  A sum = 0, total = 0;
  for (int64_t block = first; block < last; ++block) {
    const int32_t* const table = p.neighbours + block * p.table_columns;
    const T* grad = static_cast<const T*>(p.grad) + block * positions * p.channels + channel;
    for (int rank = 0; rank < positions; ++rank, grad += p.channels) {
      if (rank % 64 == 0) {
        total += sum;
        sum = 0;
      }
      if (row == 0) {
        sum += load(grad);
        continue;
      }
      const Place at =
          place(zorder_row(rank) + down, zorder_column(rank) + right, p.side, p.radius);
      const int64_t from = table[at.neighbour];
      if (from < 0) continue;
      sum += load(grad) *
             load(static_cast<const T*>(p.x) + (from * positions + at.rank) * p.channels + channel);
    }
  }
  total += sum;
  static_cast<A*>(
      p.partial)[(run * (1 + p.kernel_rows * p.kernel_columns) + row) * p.channels + channel] =
      total;
}

// Adds up the shares: eight threads take every eighth run each, then one adds their sums.
// Launch: grid ceil((1 + taps) * channels / 32), block (32, 8).
template <class T>
__global__ void __launch_bounds__(256) masked_conv2d_weight_grad_sum(MaskedConv2dWeightGrad p) {
  using A = Acc<T>;
  __shared__ A sums[8][32];
  const int64_t taps = int64_t(p.kernel_rows) * p.kernel_columns, size = (1 + taps) * p.channels;
  const int64_t i = int64_t(blockIdx.x) * 32 + threadIdx.x;
  A sum = 0;
  if (i < size) {
    const A* const partial = static_cast<const A*>(p.partial) + i;
#pragma unroll 8
    for (int64_t run = threadIdx.y; run < p.shares; run += 8) sum += partial[run * size];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || i >= size) return;
#pragma unroll
  for (int y = 1; y < 8; ++y) sum += sums[y][threadIdx.x];
  const int64_t row = i / p.channels, channel = i % p.channels;
  T* const out = row == 0 ? static_cast<T*>(p.grad_bias) + channel
                          : static_cast<T*>(p.grad_weight) + channel * taps + row - 1;
  store(sum, out);
}

// Calls launch(kernel, grid, block, shared bytes, p) with the kernel that adds up the shares.
template <class Launch>
void launch_masked_conv2d_weight_grad_sum(const MaskedConv2dWeightGrad& p, Launch&& launch) {
  if (p.channels == 0) return;
  const int64_t rows = 1 + int64_t(p.kernel_rows) * p.kernel_columns;
  with_type(p.dtype, [&](auto type) {
    launch(masked_conv2d_weight_grad_sum<decltype(type)>,
           dim3(unsigned((rows * p.channels + 31) / 32)), dim3(32, 8), 0, p);
  });
}

// The same with the kernel that p was planned for, and with the one that adds up.
template <class Launch>
void launch_masked_conv2d_weight_grad(const MaskedConv2dWeightGrad& p, Launch&& launch) {
  if (p.channels == 0) return;
  const int64_t rows = 1 + int64_t(p.kernel_rows) * p.kernel_columns;
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    if (p.tile_side == 0) {
      launch(masked_conv2d_weight_grad_any<T>,
             dim3(unsigned(p.runs), unsigned((p.channels + 31) / 32), unsigned((rows + 7) / 8)),
             dim3(32, 8), 0, p);
    } else if constexpr (!std::is_same_v<T, double>) {
      with_tile_shape(p, [&](auto side, auto kernel) {
        launch(masked_conv2d_weight_grad_tiles<T, side, kernel>,
               dim3(unsigned(p.slices), unsigned(p.runs)), dim3(32, kReducingWarps<side, kernel>),
               0, p);
      });
    }
  });
  launch_masked_conv2d_weight_grad_sum(p, launch);
}

}  // namespace convmae::cuda
