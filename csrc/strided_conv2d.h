// Depthwise convolution of packed features with a stride, an even kernel or one off its centre, and
// its gradients: parameters and launches.
#pragma once

#include <cstdint>

#include "block.h"
#include "isa.h"
#include "launch.h"
#include "numbers.h"

namespace convmae {

// From blocks of `side` to blocks of side / stride: the output (row, column) meets with tap (i, j)
// the input (row * stride + i * dilation[0] - padding[0], ...), which may lie in a neighbour.
struct StridedConv2dParams {
  DType dtype;
  const int32_t* neighbours;  // [blocks, table_columns], table_columns = (2 * radius + 1)^2
  int64_t blocks, channels, table_columns;
  int side, stride, radius;
  int kernel[2], padding[2], dilation[2];

  CONVMAE_HD int taps() const { return kernel[0] * kernel[1]; }
  CONVMAE_HD int outputs_side() const { return side / stride; }
};

// The input that the output (row, column) of a block meets with a tap.
CONVMAE_HD static inline Place met_input(const StridedConv2dParams& p, int row, int column, int i,
                                         int j) {
  return place(row * p.stride + i * p.dilation[0] - p.padding[0],
               column * p.stride + j * p.dilation[1] - p.padding[1], p.side, p.radius);
}

// The output that meets the input (row, column) of a block with a tap; neighbour -1: none does.
CONVMAE_HD static inline Place met_output(const StridedConv2dParams& p, int row, int column, int i,
                                          int j) {
  // In inputs from the first block of the neighbours on, so never negative where it is an output.
  const int reach = p.radius * p.side, log = log2_side(p.stride);
  const int y = row + p.padding[0] - i * p.dilation[0] + reach;
  const int x = column + p.padding[1] - j * p.dilation[1] + reach;
  if (((y | x) & (p.stride - 1)) != 0) return {-1, 0};
  return place((y - reach) >> log, (x - reach) >> log, p.outputs_side(), p.radius);
}

namespace cpu {

// A tap, and what a position meets with it.
struct Meeting {
  int32_t tap;
  Place place;
};

// Position `rank` of every block of the result meets the positions of the source that are listed
// from meetings[first[rank]] to before meetings[first[rank + 1]], in the order of the taps. Weights
// are [1 + taps, channels], the bias and then the taps, in the accumulation type.
struct StridedConv2dProducts : StridedConv2dParams {
  const Meeting* meetings;
  const int32_t* first;
  int64_t positions, source_positions;
  const void* source;  // [blocks, source_positions, channels]
  const void* weight;
  void* result;  // [blocks, positions, channels]
};

// The meetings are those of the outputs. `partial` is [1 + taps, channels], zeros at first.
struct StridedConv2dWeightGrad : StridedConv2dParams {
  const Meeting* meetings;
  const int32_t* first;
  int64_t positions, source_positions;
  const void* source;
  const void* grad;  // [blocks, positions, channels]
};

// They work on the blocks [begin, end); the first is the convolution and, with the meetings of the
// inputs, its gradient in them.
template <Isa isa>
void strided_conv2d(const StridedConv2dProducts& p, int64_t begin, int64_t end);
template <Isa isa>
void strided_conv2d_weight_grad(const StridedConv2dWeightGrad& p, void* partial, int64_t begin,
                                int64_t end);
}  // namespace cpu

namespace cuda {

// The convolution of `source`, or with `backwards` its gradient in the input. weight is [taps,
// channels], bias [channels] or null, all in the dtype of the features.
struct StridedConv2dProducts : StridedConv2dParams {
  bool backwards;
  const void* source;
  const void* weight;
  const void* bias;
  void* result;
};

// partial is [runs, 1 + taps, channels] in the accumulation type: the share of every run of
// `blocks_per_run` blocks of the gradients of the bias and the taps. Their sums go to grad_weight,
// [channels, taps], and grad_bias, [channels].
struct StridedConv2dWeightGrad : StridedConv2dParams {
  int64_t runs, blocks_per_run;
  const void* x;
  const void* grad;
  void* partial;
  void* grad_weight;
  void* grad_bias;
};

// Cuts the blocks into runs: as many as keep a GPU busy, as far as each has some 64 outputs. They
// follow from the problem alone, as the order of the sums does.
inline void plan_strided_weight_grad(StridedConv2dWeightGrad& p) {
  constexpr int64_t kOutputs = 64, kMostRuns = 1024;
  const int64_t outputs = int64_t(p.outputs_side()) * p.outputs_side();
  const int64_t least = outputs < kOutputs ? kOutputs / outputs : 1;
  const int64_t cut = (p.blocks + kMostRuns - 1) / kMostRuns;
  p.blocks_per_run = cut > least ? cut : least;
  p.runs = (p.blocks + p.blocks_per_run - 1) / p.blocks_per_run;
  if (p.runs == 0) p.runs = 1;  // of nothing: its sums are zeros
}

LaunchError strided_conv2d(const StridedConv2dProducts& p, Stream stream);
LaunchError strided_conv2d_weight_grad(const StridedConv2dWeightGrad& p, Stream stream);
}  // namespace cuda
}  // namespace convmae
