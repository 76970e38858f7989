// What the kernels on tiles do at the ends of a run and of a tile: weights to registers, outputs to
// memory, sums of a thread block to its share.
#pragma once

#include "cuda/tiles.cuh"

namespace convmae::cuda {

// The weights of a lane's channels, tap by tap.
template <class T, int K>
struct Weights {
  static constexpr int V = kWordChannels<T>;
  float tap[K * K][V];

  // Starts the copies of a slice's weights as they lie in memory, [channels][K * K]; taps in
  // reverse order where `flipped`.
  __device__ static void start(const void* weight, int64_t channels, bool wide, bool flipped,
                               const Lane& lane, int64_t slice, Chunk* to) {
    constexpr int kSize = kWarpChannels<T> * K * K, kBatch = 8;
    const T* const from = static_cast<const T*>(weight) + slice * kSize;
    const int count = int(min(int64_t(kSize), channels * (K * K) - slice * kSize));
    if (wide && !flipped && reinterpret_cast<uintptr_t>(from) % sizeof(Chunk) == 0) {
      constexpr int n = int(sizeof(Chunk) / sizeof(T));
#pragma unroll
      for (int i = lane.lane; i < kSize / n; i += 32) {
        if (i < count / n) copy_chunk(to + i, from + i * n);
      }
      return;
    }
    const auto place = [&](int i) {
      return flipped ? i / (K * K) * (2 * K * K) + K * K - 1 - i : i;
    };
#pragma unroll 1
    for (int first = lane.lane; first < count; first += 32 * kBatch) {
      T values[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (first + 32 * i < count) values[i] = from[first + 32 * i];
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (first + 32 * i < count) reinterpret_cast<T*>(to)[place(first + 32 * i)] = values[i];
      }
    }
  }

  // Takes them from where they were copied to: K * K words for each lane, in which the taps of its
  // first channel come first.
  __device__ CONVMAE_INLINE void take(const Lane& lane, const Chunk* places) {
    const uint32_t* const words = places->words + lane.lane * (K * K);
#pragma unroll
    for (int i = 0; i < K * K; ++i) {
      float values[V];
      unpack(T{}, words[i], values);
#pragma unroll
      for (int v = 0; v < V; ++v) tap[(i * V + v) % (K * K)][(i * V + v) / (K * K)] = values[v];
    }
  }
};

// Calls f(o, tap) for the outputs of a tile that a K x K kernel reaches from a position, and the
// tap that it does so with.
template <int S, int K, class F>
__device__ CONVMAE_INLINE void for_outputs(int y, int x, F&& f) {
#pragma unroll
  for (int o = 0; o < S * S; ++o) {
    const int i = y - o / S + K / 2, j = x - o % S + K / 2;
    if (i >= 0 && i < K && j >= 0 && j < K) f(o, i * K + j);
  }
}

// Reads the lane's channels of a tile that `copy_tile` has copied; `values` in raster order.
template <class T, int S>
__device__ CONVMAE_INLINE void load_tile(const uint32_t* words,
                                         float (&values)[S * S][kWordChannels<T>]) {
#pragma unroll
  for (int o = 0; o < S * S; ++o) unpack(T{}, words[zorder(o / S, o % S) * 32], values[o]);
}

// Writes a tile, `values` of the lane's channels in raster order. `to`: where the lane copies to of
// the first positions. `words` and `copies`: the lane's, of a tile of the warp's own, through which
// words become 16 bytes.
template <class T, int S>
__device__ CONVMAE_INLINE void store_tile(const Lane& lane, char* to, int32_t tile,
                                          const float (&values)[S * S][kWordChannels<T>],
                                          uint32_t* words, const Chunk* copies) {
  const auto packed = [&](int rank) CONVMAE_INLINE_LAMBDA {
    return pack(T{}, values[zorder_row(rank) * S + zorder_column(rank)]);
  };
  char* out = advance(to, tile * (S * S), lane.position_bytes);
  if (lane.wide) {
#pragma unroll
    for (int rank = 0; rank < S * S; ++rank) words[rank * 32] = packed(rank);
    __syncwarp();
    if (!lane.has_copy) return;
#pragma unroll
    for (int i = 0; i < S * S; i += 4, out += uint64_t(4) * lane.position_bytes) {
      store_chunk(copies[i * 8], out);
    }
  } else {
    if (!lane.has_copy) return;
#pragma unroll
    for (int rank = 0; rank < S * S; ++rank, out += lane.position_bytes) {
      store_word(packed(rank), out);
    }
  }
}

// Adds up the sums of bias and taps of `Warps` warps, in their order, and writes them to
// `out`, [1 + K * K, channels], from the slice's first channel on. `memories` are the warps' own,
// which nothing else uses any more.
template <class T, int K, int Warps, class Memory>
__device__ CONVMAE_INLINE void store_share(const Lane& lane, int warp, int64_t start,
                                           int64_t channels, Memory* memories,
                                           const float (&bias)[kWordChannels<T>],
                                           const float (&sum)[K * K][kWordChannels<T>],
                                           float* out) {
  constexpr int V = kWordChannels<T>, kRows = 1 + K * K;
  if constexpr (Warps == 1) {
    if (!lane.has_word) return;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        out[row * channels + lane.lane * V + v] = row == 0 ? bias[v] : sum[max(row, 1) - 1][v];
      }
    }
    return;
  }

  struct alignas(4 * V) Sums {
    float value[V];
  };
  static_assert(kRows * kWarpChannels<T> * sizeof(float) <= sizeof(Memory));
  __syncwarp();
  Sums* const own = reinterpret_cast<Sums*>(memories + warp) + lane.lane;
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    Sums& sums = own[row * 32];
#pragma unroll
    for (int v = 0; v < V; ++v) sums.value[v] = row == 0 ? bias[v] : sum[max(row, 1) - 1][v];
  }
  __syncthreads();
  constexpr int kRowsAtOnce = 32 * Warps / kWarpChannels<T>;
  const int thread = warp * 32 + lane.lane, channel = thread % kWarpChannels<T>;
  if (start + channel >= channels) return;
  for (int row = thread / kWarpChannels<T>; row < kRows; row += kRowsAtOnce) {
    float total = 0;
#pragma unroll
    for (int w = 0; w < Warps; ++w) {
      total += reinterpret_cast<const float*>(memories + w)[row * kWarpChannels<T> + channel];
    }
    out[row * channels + channel] = total;
  }
}

}  // namespace convmae::cuda
