// Depthwise convolution of packed features [blocks, side * side, channels], the positions of a
// block in Z-order; table int32 [blocks, (2 * radius + 1)^2], -1: hidden.
#pragma once

#include "cuda/tile_kernels.cuh"

namespace convmae::cuda {

// The outputs of a tile in raster order, from its window.
template <class T, int S, int K, class Window>
__device__ CONVMAE_INLINE void convolve(uint32_t visible, const Window& window,
                                        const Weights<T, K>& weight,
                                        const float (&bias)[kWordChannels<T>],
                                        float (&sum)[S * S][kWordChannels<T>]) {
  constexpr int V = kWordChannels<T>;
#pragma unroll
  for (int o = 0; o < S * S; ++o) {
#pragma unroll
    for (int v = 0; v < V; ++v) sum[o][v] = bias[v];
  }
  for_visible<T, S, K>(visible, window,
                       [&](int y, int x, const float (&values)[V]) CONVMAE_INLINE_LAMBDA {
                         for_outputs<S, K>(y, x, [&](int o, int tap) CONVMAE_INLINE_LAMBDA {
#pragma unroll
                           for (int v = 0; v < V; ++v) sum[o][v] += weight.tap[tap][v] * values[v];
                         });
                       });
}

// A square kernel of dilation 1 on blocks of side S or, for S = 4, larger. The weights of a lane's
// channels stay in registers for a whole run of tiles, and a position that is read serves every
// output of the tile that it reaches.
// Launch: grid (p.slices, p.runs), block 32. Needs words: channels * sizeof(T) a multiple of 4, x
// and y aligned to 4 bytes, to 16 where p.wide.
template <class T, int S, int K>
__global__ void __launch_bounds__(32) masked_conv2d_tiles(MaskedConv2dForward p) {
  constexpr int V = kWordChannels<T>;
  __shared__ TileMemory<S, K, 0> memory;
  const int64_t slice = blockIdx.x, run = blockIdx.y;
  const Lane lane(threadIdx.x, int(slice), uint32_t(p.channels * sizeof(T)), p.wide);

  static_assert(kWarpChannels<T> * K * K * sizeof(T) <= sizeof(memory.places[1]));
  Weights<T, K> weight;
  weight.start(p.weight, p.channels, p.wide, p.flipped, lane, slice, memory.places[1]);
  float bias[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const bool exists = lane.has_word && p.bias != nullptr;
    const int64_t channel = slice * kWarpChannels<T> + lane.lane * V + v;
    bias[v] = exists ? load(static_cast<const T*>(p.bias) + channel) : 0;
  }
  char* const y = lane.of(p.y);
  uint32_t* const words = lane.words(memory.places[0]);
  const Chunk* const copies = lane.copies(memory.places[0]);
  const int64_t first = run * p.tiles_per_run, last = min(first + p.tiles_per_run, p.tiles);
  walk_tiles<S, K>(
      p, p.x, lane, int32_t(first), int32_t(last), 1, memory,
      [](int32_t, Chunk*) CONVMAE_INLINE_LAMBDA {},
      [&](const Chunk* places) CONVMAE_INLINE_LAMBDA { weight.take(lane, places); },
      [&](int32_t tile, uint32_t visible, uint32_t at) CONVMAE_INLINE_LAMBDA {
        float sum[S * S][V];
        convolve<T, S, K>(visible, CopiedWindow<S, K>{words + at * 4}, weight, bias, sum);
        store_tile<T, S>(lane, y, tile, sum, words + at * 4, copies + at);
      });
}

// Any kernel, dilation, block side, alignment, dtype. A thread computes one channel of up to four
// positions, those of the same rank but for its last two bits.
// Launch: grid (ceil(blocks * ceil(side^2 / 4) / 8), ceil(channels / 32)), block (32, 8).
template <class T>
__global__ void __launch_bounds__(256) masked_conv2d_any(MaskedConv2dForward p) {
  using A = Acc<T>;
  const int64_t channel = int64_t(blockIdx.y) * 32 + threadIdx.x;
  const int positions = p.side * p.side, outputs = p.side == 1 ? 1 : 4;
  const int64_t first = (int64_t(blockIdx.x) * 8 + threadIdx.y) * outputs;
  const int64_t block = first >> 2 * log2_side(p.side);
  if (channel >= p.channels || block >= p.blocks) return;
  const int rank = int(first) & (positions - 1), row = zorder_row(rank),
            column = zorder_column(rank);
  const int32_t* const table = p.neighbours + block * p.table_columns;
  const T* const x = static_cast<const T*>(p.x) + channel;
  const int taps = p.kernel_rows * p.kernel_columns, step = p.flipped ? -1 : 1;
  const T* weight = static_cast<const T*>(p.weight) + channel * taps + (p.flipped ? taps - 1 : 0);

  const A bias = p.bias == nullptr ? A(0) : load(static_cast<const T*>(p.bias) + channel);
  A sum[4] = {bias, bias, bias, bias};
  for (int i = 0; i < p.kernel_rows; ++i) {
    const int y = row + (i - p.kernel_rows / 2) * p.dilation_rows;
    for (int j = 0; j < p.kernel_columns; ++j, weight += step) {
      const int x_ = column + (j - p.kernel_columns / 2) * p.dilation_columns;
      const A tap = load(weight);
#pragma unroll
      for (int o = 0; o < 4; ++o) {
        if (o >= outputs) continue;
        const Place at = place(y + o / 2, x_ + o % 2, p.side, p.radius);
        const int64_t from = table[at.neighbour];
        if (from >= 0) sum[o] += tap * load(x + (from * positions + at.rank) * p.channels);
      }
    }
  }
  T* const y = static_cast<T*>(p.y) + first * p.channels + channel;
#pragma unroll
  for (int o = 0; o < 4; ++o) {
    if (o < outputs) store(sum[o], y + o * p.channels);
  }
}

// Calls launch(kernel, grid, block, shared bytes, p) with the kernel that p was planned for.
template <class Launch>
void launch_masked_conv2d(const MaskedConv2dForward& p, Launch&& launch) {
  if (p.blocks == 0 || p.channels == 0) return;
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    if (p.tile_side == 0) {
      const int64_t groups = p.blocks * p.side * p.side / (p.side == 1 ? 1 : 4);
      launch(masked_conv2d_any<T>,
             dim3(unsigned((groups + 7) / 8), unsigned((p.channels + 31) / 32)), dim3(32, 8), 0, p);
    } else if constexpr (!std::is_same_v<T, double>) {
      with_tile_shape(p, [&](auto side, auto kernel) {
        launch(masked_conv2d_tiles<T, side, kernel>, dim3(unsigned(p.slices), unsigned(p.runs)),
               dim3(32), 0, p);
      });
    }
  });
}

}  // namespace convmae::cuda
