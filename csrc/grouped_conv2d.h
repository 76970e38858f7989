// Convolution of packed features in groups of channels, its gradients: parameters and launches.
#pragma once

#include <cstdint>

#include "block.h"
#include "isa.h"
#include "numbers.h"

// Never a function of its own, of which the linker could keep one that was compiled for another
// instruction set.
#define CONVMAE_INLINE __attribute__((always_inline)) inline

namespace convmae {

// How weights, and their gradients, lie for the kernels: [bundle][tap][in][vectors * lanes], in the
// accumulation type. A bundle is `merged` groups side by side: one, or as many as fit in a vector
// of `lanes` with their inputs and with their outputs. A row holds the weights of one input of
// every group of the bundle, one group's outputs after the other's; what is left of it are zeros.
struct GroupedLayout {
  int64_t groups, in, out, taps;  // `in` and `out` are channels of one group
  int64_t lanes, merged;

  CONVMAE_INLINE int64_t bundles() const { return (groups + merged - 1) / merged; }
  CONVMAE_INLINE int64_t vectors() const { return (merged * out + lanes - 1) / lanes; }
  CONVMAE_INLINE int64_t row() const { return vectors() * lanes; }
  CONVMAE_INLINE int64_t size() const { return bundles() * taps * in * row(); }
  // How many outputs a bundle has; the last one can have fewer groups than the others.
  CONVMAE_INLINE int64_t outputs(int64_t bundle) const {
    const int64_t left = groups - bundle * merged;
    return (left < merged ? left : merged) * out;
  }
};

namespace cpu {

// Every position of a block sees, with tap t, the source position `places[position * taps + t]`, or
// none (neighbour < 0). Sources and the other maps are [blocks, positions, channels], contiguous;
// all numbers are of the accumulation type. Positions whose rank is the same modulo `classes` see
// the same taps. Work is cut into chunks of `chunk_blocks` blocks.
struct GroupedConv2dParams {
  GroupedLayout layout;
  DType dtype;  // Float or Double
  const void* source;
  const int32_t* neighbours;  // [blocks, table_columns]
  const Place* places;
  int64_t blocks, positions, source_positions, table_columns, classes, chunk_blocks;

  CONVMAE_INLINE int64_t chunks() const { return (blocks + chunk_blocks - 1) / chunk_blocks; }
};

// The bias is [bundles][vectors * lanes], as a row of weights is.
struct GroupedConv2dForward : GroupedConv2dParams {
  const void* weight;
  const void* bias;
  void* y;  // [blocks, positions, groups * out]
};

// A share of the gradients is [size of the layout] and then [groups * out] of the bias.
struct GroupedConv2dWeightGrad : GroupedConv2dParams {
  const void* grad;  // [blocks, positions, groups * out]
};

// They work on the chunks [begin, end). `partial`, zeros at first, gets the gradient of these
// alone.
template <Isa isa>
void grouped_conv2d(const GroupedConv2dForward& p, int64_t begin, int64_t end);
template <Isa isa>
void grouped_conv2d_weight_grad(const GroupedConv2dWeightGrad& p, void* partial, int64_t begin,
                                int64_t end);
}  // namespace cpu
}  // namespace convmae
