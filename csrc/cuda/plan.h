// How the depthwise convolution is cut into runs and slices for the GPU; on the host, no CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

#include "masked_conv2d.h"

namespace convmae::cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool aligned(const void* pointer, int bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Whether the kernels on tiles can do it, and how; `tensors` are those that lie like x.
inline void plan_tiles(MaskedConv2dRuns& p, std::initializer_list<const void*> tensors) {
  const int64_t bytes = p.channels * size_of(p.dtype);
  const auto all_aligned = [&](int to) {
    return bytes % to == 0 &&
           std::all_of(tensors.begin(), tensors.end(), [&](auto t) { return aligned(t, to); });
  };
  const bool square = p.kernel_rows == p.kernel_columns && p.kernel_rows >= 3 && p.kernel_rows <= 7;
  const bool dense = p.dilation_rows == 1 && p.dilation_columns == 1;
  const int side = p.side >= 4 ? 4 : p.side;
  p.log_tiles = 0;
  while (side << p.log_tiles < p.side) ++p.log_tiles;
  p.tiles = p.blocks << 2 * p.log_tiles;
  // Positions, and the bytes of a tile, are counted in 32 bits.
  const bool small = p.blocks * p.side * p.side < int64_t(1) << 31 && bytes * 16 < int64_t(1) << 31;
  const bool runs_on_tiles =
      p.dtype != DType::Double && square && dense && side >= 2 && small && all_aligned(4);
  p.tile_side = runs_on_tiles ? side : 0;
  p.slices = ceil_div(bytes, 128);
  p.wide = all_aligned(16);
  if (!runs_on_tiles) {
    p.log_tiles = 0;
    p.tiles = p.blocks;
  }
}

constexpr int64_t kMaxRuns = 65535;  // the second dimension of a grid

inline void cut_runs(MaskedConv2dRuns& p, int64_t runs) {
  p.tiles_per_run = std::max<int64_t>(1, ceil_div(p.tiles, std::clamp<int64_t>(runs, 1, kMaxRuns)));
  p.runs = std::max<int64_t>(1, ceil_div(p.tiles, p.tiles_per_run));
}

// A run loads its weights once, so it should be long; and there should be several warps for each of
// the places that a multiprocessor has for them, about 12, so that all end at the same time.
inline void plan_forward(MaskedConv2dForward& p, int multiprocessors) {
  plan_tiles(p, {p.x, p.y});
  const int64_t warps = int64_t(multiprocessors) * 24;
  const int64_t runs = std::max(ceil_div(warps, std::max<int64_t>(1, p.slices)), p.tiles / 64);
  cut_runs(p, runs);
}

// The number of runs depends on the problem only, so that the order of the sum does: eight warps
// for each of the 132 multiprocessors of an H100, as far as there are four tiles for each.
inline void plan_weight_grad(MaskedConv2dWeightGrad& p) {
  plan_tiles(p, {p.x, p.grad});
  const int64_t runs = 8 * 132 / std::max<int64_t>(1, p.slices);
  cut_runs(p, std::clamp<int64_t>(runs, 1, std::max<int64_t>(1, p.tiles / 4)));
}

}  // namespace convmae::cuda
