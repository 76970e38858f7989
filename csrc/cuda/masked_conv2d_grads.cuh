// All gradients of the depthwise convolution in one look at the output gradient: the window of a
// tile of it serves the input gradient of the tile, and, with the tile of x, the sums of the taps.
// Of a tile of grad and one of x that are read, and one that is written, each byte moves once.
#pragma once

#include "cuda/tile_kernels.cuh"

namespace convmae::cuda {

// What a warp keeps for a whole run: weights, and sums of bias and taps.
template <class T, int S, int K>
struct GradSums {
  static constexpr int V = kWordChannels<T>;
  Weights<T, K> weight;
  float bias[V] = {}, tap[K * K][V] = {};

  // Adds what a tile brings, and gives its input gradient, in raster order as x. A position of grad
  // reaches a position of x with the tap that leads back.
  template <class Window>
  __device__ CONVMAE_INLINE void add(uint32_t visible, const Window& window,
                                     const float (&x)[S * S][V], float (&grad_x)[S * S][V]) {
#pragma unroll
    for (int o = 0; o < S * S; ++o) {
#pragma unroll
      for (int v = 0; v < V; ++v) grad_x[o][v] = 0;
    }
    for_visible<T, S, K>(
        visible, window, [&](int row, int column, const float (&grad)[V]) CONVMAE_INLINE_LAMBDA {
          if (row >= 0 && row < S && column >= 0 && column < S) {
#pragma unroll
            for (int v = 0; v < V; ++v) bias[v] += grad[v];
          }
          for_outputs<S, K>(row, column, [&](int o, int flipped) CONVMAE_INLINE_LAMBDA {
            const int back = K * K - 1 - flipped;
#pragma unroll
            for (int v = 0; v < V; ++v) {
              grad_x[o][v] += weight.tap[back][v] * grad[v];
              tap[back][v] += x[o][v] * grad[v];
            }
          });
        });
  }
};

// A square kernel of dilation 1 on blocks of side S or, for S = 4, larger. kGradsWarps<S, K> warps
// take the tiles of a run in turns; those of a thread block add up their sums to one share.
// Launch: grid (p.slices, p.shares), block (32, kReducingWarps<S, K>). Needs words: channels *
// sizeof(T) a multiple of 4, x, grad and grad_x aligned to 4 bytes, to 16 where p.wide.
template <class T, int S, int K>
__global__ void __launch_bounds__(32 * kReducingWarps<S, K>)
    masked_conv2d_grads_tiles(MaskedConv2dGrads p) {
  constexpr int V = kWordChannels<T>, kPlaces = Surroundings<S, K>::kPlaces;
  constexpr int kWarps = kReducingWarps<S, K>, kShares = kGradsShares<S, K>;
  __shared__ TileMemory<S, K, S * S> memories[kWarps];
  const int64_t slice = blockIdx.x, run = blockIdx.y / kShares;
  const int warp = __shfl_sync(0xffffffffu, int(threadIdx.y), 0);  // so that all lanes agree
  TileMemory<S, K, S * S>& memory = memories[warp];
  const Lane lane(threadIdx.x, int(slice), uint32_t(p.channels * sizeof(T)), p.wide);
  const char* const features = lane.of(p.x);
  char* const grad_x = lane.of(p.grad_x);
  uint32_t* const words = lane.words(memory.places[0]);
  const Chunk* const copies = lane.copies(memory.places[0]);

  GradSums<T, S, K> sums;
  sums.weight.start(p.weight, p.channels, p.wide, false, lane, slice, memory.places[1]);
  const int64_t begin = run * p.tiles_per_run, end = min(begin + p.tiles_per_run, p.tiles);
  const int64_t first = begin + blockIdx.y % kShares * kWarps + warp;
  walk_tiles<S, K>(
      p, p.grad, lane, int32_t(first), int32_t(end), kWarps * kShares, memory,
      [&](int32_t tile, Chunk* places)
          CONVMAE_INLINE_LAMBDA { copy_tile<S>(lane, features, tile, places); },
      [&](const Chunk* places) CONVMAE_INLINE_LAMBDA { sums.weight.take(lane, places); },
      [&](int32_t tile, uint32_t visible, uint32_t at) CONVMAE_INLINE_LAMBDA {
        float x[S * S][V], grad[S * S][V];
        load_tile<T, S>(words + (at + kPlaces * 8) * 4, x);
        sums.add(visible, CopiedWindow<S, K>{words + at * 4}, x, grad);
        store_tile<T, S>(lane, grad_x, tile, grad, words + (at + kPlaces * 8) * 4,
                         copies + (at + kPlaces * 8));
      });
  copies_wait();  // of the weights, if there was no tile: sums go to the same place
  const int64_t start = slice * kWarpChannels<T>;  // the first channel
  float* const out = static_cast<float*>(p.partial) + blockIdx.y * (1 + K * K) * p.channels + start;
  store_share<T, K, kWarps>(lane, warp, start, p.channels, memories, sums.bias, sums.tap, out);
}

// Calls launch(kernel, grid, block, shared bytes, p) with the kernel that p was planned for. Shares
// are added up by launch_masked_conv2d_weight_grad_sum.
template <class Launch>
void launch_masked_conv2d_grads(const MaskedConv2dGrads& p, Launch&& launch) {
  if (p.channels == 0) return;
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (!std::is_same_v<T, double>) {
      with_tile_shape(p, [&](auto side, auto kernel) {
        if constexpr (fits_grads(side, kernel, kWordChannels<T>)) {
          launch(masked_conv2d_grads_tiles<T, side, kernel>,
                 dim3(unsigned(p.slices), unsigned(p.shares)),
                 dim3(32, kReducingWarps<side, kernel>), 0, p);
        }
      });
    }
  });
}

}  // namespace convmae::cuda
