// Packed features back to dense feature maps: checks, allocation, registration.
#include "scatter_visible.h"

#include <cmath>
#include <vector>

#include "common.h"

namespace convmae {
namespace {

// Fills in all but row_of_block and fill; `x` and `block_index` must be contiguous.
ScatterVisibleParams fill_params(const Tensor& x, const Tensor& block_index, int64_t batch,
                                 int64_t gh, int64_t gw, Tensor& y) {
  check_same_device(block_index, "block_index", x);
  check_floating(x, "x");
  STD_TORCH_CHECK(x.dim() == 3, "x must be [T, s*s, C]");
  STD_TORCH_CHECK(block_index.dim() == 1 && block_index.scalar_type() == ScalarType::Long &&
                      block_index.size(0) == x.size(0),
                  "block_index must be int64 [T]");
  const int64_t side = std::lround(std::sqrt(double(x.size(1))));
  STD_TORCH_CHECK(side >= 1 && side <= 32 && (side & (side - 1)) == 0 && side * side == x.size(1),
                  "block sides are 1, 2, 4, 8, 16 or 32");
  y = torch::stable::new_empty(x, {batch, gh * side, gw * side, x.size(2)});
  ScatterVisibleParams p;
  p.x = x.const_data_ptr();
  p.y = y.mutable_data_ptr();
  p.batch = batch;
  p.channels = x.size(2);
  p.grid_rows = gh;
  p.grid_columns = gw;
  p.side = int(side);
  p.element_size = int(x.element_size());
  return p;
}

// [B, H, W, C] -> [B, C, H, W], channels-last
Tensor channels_first(const Tensor& y) {
  return torch::stable::transpose(torch::stable::transpose(y, 1, 3), 2, 3);
}

Tensor scatter_visible(const Tensor& x_, const Tensor& block_index_, int64_t batch, int64_t gh,
                       int64_t gw, double fill) {
  const Tensor x = torch::stable::contiguous(x_);
  const Tensor block_index = torch::stable::contiguous(block_index_);
  Tensor y;
  ScatterVisibleParams p = fill_params(x, block_index, batch, gh, gw, y);
  const int64_t blocks = batch * gh * gw;
  std::vector<int64_t> row_of_block(blocks, -1);
  const int64_t* index = block_index.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < x.size(0); ++row) {
    STD_TORCH_CHECK(index[row] >= 0 && index[row] < blocks, "block_index holds ", index[row],
                    ", but there are ", blocks, " blocks");
    row_of_block[index[row]] = row;
  }
  const uint64_t bits = element_bits(dtype_of(x), fill);
  p.row_of_block = row_of_block.data();
  p.fill = &bits;
  torch::stable::parallel_for(
      0, p.batch * p.grid_rows * p.side, grain(p.grid_columns * p.side * p.channels),
      [&](int64_t begin, int64_t end) { cpu::scatter_visible(p, begin, end); });
  return channels_first(y);
}

#ifdef WITH_CUDA
Tensor scatter_visible_cuda(const Tensor& x_, const Tensor& block_index_, int64_t batch, int64_t gh,
                            int64_t gw, double fill) {
  const OnDevice device(x_);
  const Tensor x = torch::stable::contiguous(x_);
  const Tensor block_index = torch::stable::contiguous(block_index_);
  Tensor y;
  ScatterVisibleParams p = fill_params(x, block_index, batch, gh, gw, y);
  Tensor row_of_block = torch::stable::new_empty(block_index, {batch * gh * gw});
  torch::stable::fill_(row_of_block, -1.0);
  const ScatterVisibleRows rows = {block_index.const_data_ptr<int64_t>(),
                                   row_of_block.mutable_data_ptr<int64_t>(), x.size(0)};
  const uint64_t bits = element_bits(dtype_of(x), fill);
  p.row_of_block = rows.row_of_block;
  p.fill = &bits;
  device.check(cuda::scatter_visible(rows, p, device.stream()));
  return channels_first(y);
}
#endif

}  // namespace
}  // namespace convmae

STABLE_TORCH_LIBRARY_IMPL(convmae, CPU, m) {
  m.impl("scatter_visible", TORCH_BOX(&convmae::scatter_visible));
}

#ifdef WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(convmae, CUDA, m) {
  m.impl("scatter_visible", TORCH_BOX(&convmae::scatter_visible_cuda));
}
#endif
