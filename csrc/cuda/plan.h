// How the depthwise convolution is cut into runs and slices for the GPU; on the host, no CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/kernel_choice.h"
#include "cuda/tile_memory.h"
#include "masked_conv2d.h"

namespace convmae::cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline const char* name_of(Kernel kernel) {
  return kernel == Kernel::Any ? "any" : kernel == Kernel::Tiles ? "tiles" : "tensor";
}

inline bool aligned(const void* pointer, int bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Why the kernels on tiles cannot do it; null: they can. `tensors` are those that lie like x.
inline const char* why_not_tiles(const MaskedConv2dRuns& p,
                                 std::initializer_list<const void*> tensors) {
  const int64_t bytes = p.channels * size_of(p.dtype);
  if (p.dtype == DType::Double) return "float64 has no other kernel";
  if (p.kernel_rows != p.kernel_columns || p.kernel_rows < 3 || p.kernel_rows > 7) {
    return "the kernel is not 3 x 3, 5 x 5 or 7 x 7";
  }
  if (p.dilation_rows != 1 || p.dilation_columns != 1) return "the kernel is dilated";
  if (p.side < 2) return "blocks are single positions";
  // Positions, and the bytes of a tile, are counted in 32 bits.
  if (p.blocks * p.side * p.side >= int64_t(1) << 31) return "there are 2^31 positions or more";
  if (bytes * 16 >= int64_t(1) << 31) return "the channels take 2^27 bytes or more";
  if (bytes % 4 != 0) return "the channels do not fill words of 4 bytes";
  const bool words =
      std::all_of(tensors.begin(), tensors.end(), [](auto t) { return aligned(t, 4); });
  return words ? nullptr : "the features do not begin at a multiple of 4 bytes";
}

// Which kernel, and how it is cut; `op` is the one that asks.
inline void plan_tiles(MaskedConv2dRuns& p, const char* op,
                       std::initializer_list<const void*> tensors) {
  const int64_t bytes = p.channels * size_of(p.dtype);
  const int side = p.side >= 4 ? 4 : p.side;
  p.log_tiles = 0;
  while (side << p.log_tiles < p.side) ++p.log_tiles;
  p.tiles = p.blocks << 2 * p.log_tiles;
  const bool runs_on_tiles =
      why_not_tiles(p, tensors) == nullptr && kernel_choices().find(op, p) != "any";
  p.tile_side = runs_on_tiles ? side : 0;
  p.kernel = runs_on_tiles ? Kernel::Tiles : Kernel::Any;
  p.slices = ceil_div(bytes, 128);
  p.wide = bytes % 16 == 0 &&
           std::all_of(tensors.begin(), tensors.end(), [](auto t) { return aligned(t, 16); });
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

// 7x7 in half types, on tiles of 4x4 and with 16 bytes at a time: tensor cores, and slices of 64
// bytes, all of them whole.
inline bool fits_tensor_cores(const MaskedConv2dForward& p) {
  return p.tile_side == 4 && p.kernel_rows == 7 && size_of(p.dtype) == 2 && p.wide &&
         p.channels % 32 == 0;
}

// The first step of a plan: which kernel. The second one cuts runs for the GPU.
inline void plan_forward(MaskedConv2dForward& p, bool tensor_cores = true) {
  plan_tiles(p, "masked_conv2d", {p.x, p.y});
  if (tensor_cores && fits_tensor_cores(p) &&
      kernel_choices().find("masked_conv2d", p) != "tiles") {
    p.kernel = Kernel::Tensor;
    p.slices = ceil_div(p.channels * size_of(p.dtype), 64);
  }
  cut_runs(p, 1);
}

// A run loads its weights once and fills its pipeline once, so it should be long; and as many as
// the GPU holds warps (with tensor cores, thread blocks) should be there at once, so that they end
// together. Tensor cores take eight tiles at a time.
inline void cut_forward(MaskedConv2dForward& p, int64_t warps) {
  cut_runs(p, warps / std::max<int64_t>(1, p.slices));
  if (p.kernel != Kernel::Tensor) return;
  p.tiles_per_run = ceil_div(p.tiles_per_run, 8) * 8;
  p.runs = std::max<int64_t>(1, ceil_div(p.tiles, p.tiles_per_run));
}

// The number of runs depends on the problem only, so that the order of the sum does: as many thread
// blocks as an H100 holds at a time, as far as there are four tiles for each of their warps. The
// kernel for any shape has its share of eight for each multiprocessor.
inline void plan_weight_grad(MaskedConv2dWeightGrad& p) {
  plan_tiles(p, "masked_conv2d_weight_grad", {p.x, p.grad});
  int64_t blocks = 8 * 132, warps = 1;
  if (p.tile_side > 0) {
    with_tile_shape(p, [&](auto side, auto kernel) {
      blocks = kReducingBlocks<side, kernel>;
      warps = kReducingWarps<side, kernel>;
    });
  }
  const int64_t most = std::max<int64_t>(1, p.tiles / (4 * warps));
  cut_runs(p, std::clamp<int64_t>(blocks / std::max<int64_t>(1, p.slices), 1, most));
  p.shares = p.runs;
}

// Which kernel gives all gradients; `Any`: several do. The runs follow from the problem only, as
// above.
inline void plan_grads(MaskedConv2dGrads& p) {
  plan_tiles(p, "masked_conv2d_grads", {p.x, p.grad, p.grad_x});
  if (p.kernel == Kernel::Any || !fits_grads(p.tile_side, p.kernel_rows, 4 / size_of(p.dtype))) {
    p.kernel = Kernel::Any;
    p.tile_side = 0;
    return;
  }
  with_tile_shape(p, [&](auto side, auto kernel) {
    const int64_t most = std::max<int64_t>(1, p.tiles / (4 * kGradsWarps<side, kernel>));
    const int64_t runs = kGradsRuns<side, kernel> / std::max<int64_t>(1, p.slices);
    cut_runs(p, std::clamp<int64_t>(runs, 1, most));
    p.shares = p.runs * kGradsShares<side, kernel>;
  });
}

}  // namespace convmae::cuda
