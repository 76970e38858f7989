// Depthwise convolution of packed features, and its weight gradient: parameters and launches.
#pragma once

#include <cstdint>

#include "block.h"

namespace convmae {

enum class DType : int { Float, BFloat16, Half, Double };

// x and y are [blocks, side * side, channels]; weights and their gradients are
// [1 + kernel_rows * kernel_columns, channels], the bias and then the taps, in the accumulation
// type (float, or double for double). `window` holds the place of every position of the block and
// its halo, [side + 2 * halo_rows][side + 2 * halo_columns] in raster order.
struct MaskedConv2dParams {
  DType dtype;
  const void* x;
  const int32_t* neighbours;  // [blocks, table_columns]
  const Place* window;
  int64_t blocks, channels, table_columns;
  int side, kernel_rows, kernel_columns, dilation_rows, dilation_columns;

  int halo_rows() const { return kernel_rows / 2 * dilation_rows; }
  int halo_columns() const { return kernel_columns / 2 * dilation_columns; }
  int window_rows() const { return side + 2 * halo_rows(); }
  int window_columns() const { return side + 2 * halo_columns(); }
};

struct MaskedConv2dForward : MaskedConv2dParams {
  const void* weight;
  void* y;
};

struct MaskedConv2dWeightGrad : MaskedConv2dParams {
  const void* grad;
};

// Kernels of one instruction set: they work on the blocks [begin, end). `partial` is the gradient
// of these blocks alone.
struct MaskedConv2dKernels {
  void (*forward)(const MaskedConv2dForward&, int64_t begin, int64_t end);
  void (*weight_grad)(const MaskedConv2dWeightGrad&, void* partial, int64_t begin, int64_t end);
};

namespace cpu {
namespace baseline {
extern const MaskedConv2dKernels masked_conv2d;
}
namespace avx2 {
extern const MaskedConv2dKernels masked_conv2d;
}
namespace avx512 {
extern const MaskedConv2dKernels masked_conv2d;
}
}  // namespace cpu
}  // namespace convmae
