// Depthwise convolution of packed features, and its gradients: parameters and launches.
#pragma once

#include <cstdint>

#include "block.h"
#include "isa.h"
#include "launch.h"
#include "numbers.h"

namespace convmae {

// x is [blocks, side * side, channels], contiguous.
struct MaskedConv2dParams {
  DType dtype;
  const void* x;
  const int32_t* neighbours;  // [blocks, table_columns], table_columns = (2 * radius + 1)^2
  int64_t blocks, channels, table_columns;
  int side, radius, kernel_rows, kernel_columns, dilation_rows, dilation_columns;

  int halo_rows() const { return kernel_rows / 2 * dilation_rows; }
  int halo_columns() const { return kernel_columns / 2 * dilation_columns; }
  int window_rows() const { return side + 2 * halo_rows(); }
  int window_columns() const { return side + 2 * halo_columns(); }
};

namespace cpu {

// The kernels that networks use, 3 x 3, 5 x 5 and 7 x 7 without dilation, work on tiles of 4 x 4 or
// 2 x 2 positions, for whole vectors of channels. `window` then holds the place of the first
// position of every tile that a tile sees, [tiles of a block][n * n], n = 2 * reach + 1, `reach`
// tiles to each side. Else tile_side is 0, and it holds the place of every position of the block
// and its halo, [side + 2 * halo_rows][side + 2 * halo_columns] in raster order.
struct MaskedConv2dWindow : MaskedConv2dParams {
  int tile_side;
  const Place* window;

  static int choose_tile_side(const MaskedConv2dParams& p, int vector_bytes) {
    const int k = p.kernel_rows;
    const bool fits = k == p.kernel_columns && (k == 3 || k == 5 || k == 7) &&
                      p.dilation_rows == 1 && p.dilation_columns == 1 && p.side >= 2 &&
                      p.dtype != DType::Double && p.channels * 4 >= vector_bytes;
    return fits ? (p.side >= 4 ? 4 : 2) : 0;
  }
  int reach() const { return (kernel_rows / 2 + tile_side - 1) / tile_side; }
};

// Weights are [channels, kernel_rows * kernel_columns], in the dtype of x; y and grad are like x.
struct MaskedConv2dForward : MaskedConv2dWindow {
  const void* weight;
  const void* bias;  // [channels], or null
  void* y;
};

// The blocks are cut into parts. `partial` is [parts][1 + taps][channels] in the accumulation type
// (float, or double for double): the share of each in the gradients of the bias and the taps.
struct MaskedConv2dGrads : MaskedConv2dWindow {
  const void* grad;
  const void* weight;  // not read where grad_x is null
  void* grad_x;        // like x, or null
  void* partial;
  int64_t parts;

  int64_t first_block(int64_t part) const { return part * blocks / parts; }
};

template <Isa isa>
void masked_conv2d(const MaskedConv2dForward& p, int64_t begin, int64_t end);  // blocks
template <Isa isa>
void masked_conv2d_grads(const MaskedConv2dGrads& p, int64_t first_part, int64_t last_part);
}  // namespace cpu

namespace cuda {

// How the work is cut for the kernels on tiles (see tiles.cuh): a block is 4^log_tiles tiles, a run
// the consecutive tiles that one thread block works on, a slice 128 bytes of channels. The weight
// gradient for any shape has runs too, of whole blocks (log_tiles = 0).
struct MaskedConv2dRuns : MaskedConv2dParams {
  int64_t tiles, tiles_per_run, runs, slices;
  int tile_side;  // 2 or 4; 0: the kernel for any shape
  int log_tiles;
  bool wide;  // features can be read 16 bytes at a time
};

// For any shape; on tiles with multiply-adds (masked_conv2d.cuh); on tiles with tensor cores
// (masked_conv2d_tensor.cuh).
enum class Kernel { Any, Tiles, Tensor };

// weight is [channels, kernel_rows * kernel_columns], bias [channels] or null, both in the dtype of
// x; y is like x. `flipped`: the taps in reverse order, for the gradient in x.
struct MaskedConv2dForward : MaskedConv2dRuns {
  bool flipped = false;
  const void* weight;
  const void* bias;
  void* y;
  Kernel kernel;
};

// grad is like x. partial is [shares, 1 + kernel_rows * kernel_columns, channels], every run's
// share of the gradients of the bias and the taps, in the accumulation type. Their sums go to
// grad_weight, [channels, kernel_rows * kernel_columns], and grad_bias, [channels].
struct MaskedConv2dWeightGrad : MaskedConv2dRuns {
  int64_t shares;
  const void* grad;
  void* partial;
  void* grad_weight;
  void* grad_bias;
};

// All gradients at once. weight as in MaskedConv2dForward; grad_x is like x. A run has several
// shares.
struct MaskedConv2dGrads : MaskedConv2dWeightGrad {
  const void* weight;
  void* grad_x;
};

LaunchError masked_conv2d(const MaskedConv2dForward& p, Stream stream);
// How many warps of the kernel on tiles the current GPU holds at a time; 0: it cannot run it.
int64_t masked_conv2d_warps(const MaskedConv2dForward& p);
// The same for Kernel::Tensor, whose thread blocks are counted instead of warps.
LaunchError masked_conv2d_tensor(const MaskedConv2dForward& p, Stream stream);
int64_t masked_conv2d_tensor_blocks(const MaskedConv2dForward& p);
LaunchError masked_conv2d_weight_grad(const MaskedConv2dWeightGrad& p, Stream stream);
LaunchError masked_conv2d_weight_grad_sum(const MaskedConv2dWeightGrad& p, Stream stream);
LaunchError masked_conv2d_grads(const MaskedConv2dGrads& p, Stream stream);
}  // namespace cuda
}  // namespace convmae
