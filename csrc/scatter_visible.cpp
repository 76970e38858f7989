// Packed features back to dense feature maps: checks, allocation, registration.
#include "scatter_visible.h"

#include <cmath>
#include <string>
#include <vector>

#include "common.h"

namespace convmae {
namespace {

Tensor scatter_visible(const Tensor& x_, const Tensor& block_index_, int64_t batch, int64_t gh,
                       int64_t gw, double fill) {
  check_cpu(x_, "x");
  check_cpu(block_index_, "block_index");
  check_floating(x_, "x");
  STD_TORCH_CHECK(x_.dim() == 3, "x must be [T, s*s, C]");
  STD_TORCH_CHECK(block_index_.dim() == 1 && block_index_.scalar_type() == ScalarType::Long &&
                      block_index_.size(0) == x_.size(0),
                  "block_index must be int64 [T]");
  const Tensor x = torch::stable::contiguous(x_);
  const Tensor block_index = torch::stable::contiguous(block_index_);
  const int64_t side = std::lround(std::sqrt(double(x.size(1))));
  STD_TORCH_CHECK(side >= 1 && side <= 32 && (side & (side - 1)) == 0 && side * side == x.size(1),
                  "block sides are 1, 2, 4, 8, 16 or 32");
  const int64_t blocks = batch * gh * gw, channels = x.size(2);
  std::vector<int64_t> row_of_block(blocks, -1);
  const int64_t* index = block_index.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < x.size(0); ++row) {
    STD_TORCH_CHECK(index[row] >= 0 && index[row] < blocks, "block_index holds ", index[row],
                    ", but there are ", blocks, " blocks");
    row_of_block[index[row]] = row;
  }
  const Tensor element = torch::stable::fill_(torch::stable::new_empty(x, {1}), fill);
  Tensor y = torch::stable::new_empty(x, {batch, gh * side, gw * side, channels});
  ScatterVisibleParams p;
  p.x = x.const_data_ptr();
  p.row_of_block = row_of_block.data();
  p.y = y.mutable_data_ptr();
  p.fill = element.const_data_ptr();
  p.channels = channels;
  p.grid_rows = gh;
  p.grid_columns = gw;
  p.side = int(side);
  p.element_size = int(x.element_size());
  torch::stable::parallel_for(
      0, blocks, grain(side * side * channels),
      [&](int64_t begin, int64_t end) { cpu::scatter_visible(p, begin, end); });
  // [B, H, W, C] -> [B, C, H, W], channels-last
  return torch::stable::transpose(torch::stable::transpose(y, 1, 3), 2, 3);
}

// The instruction set of the kernels, for people.
std::string cpu_capability() {
  switch (cpu_isa()) {
    case Isa::Avx512: return "AVX-512";
    case Isa::Avx2: return "AVX2";
    case Isa::Baseline: break;
  }
  return "baseline";
}

}  // namespace
}  // namespace convmae

STABLE_TORCH_LIBRARY_IMPL(convmae, CPU, m) {
  m.impl("scatter_visible", TORCH_BOX(&convmae::scatter_visible));
}

STABLE_TORCH_LIBRARY_IMPL(convmae, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&convmae::cpu_capability));
}
