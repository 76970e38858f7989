// Visible blocks of dense feature maps to packed features: checks, allocation, registration.
#include "gather_visible.h"

#include "common.h"

namespace convmae {
namespace {

// Fills in everything; `block_index` must be contiguous.
GatherVisibleParams fill_params(const Tensor& images, const Tensor& block_index, int64_t gh,
                                int64_t gw, Tensor& y) {
  check_same_device(block_index, "block_index", images);
  check_floating(images, "images");
  STD_TORCH_CHECK(images.dim() == 4, "images must be [B, C, H, W]");
  STD_TORCH_CHECK(block_index.dim() == 1 && block_index.scalar_type() == ScalarType::Long,
                  "block_index must be int64 [T]");
  const int64_t side = gh > 0 ? images.size(2) / gh : 0;
  STD_TORCH_CHECK(side >= 1 && side <= 32 && (side & (side - 1)) == 0 &&
                      images.size(2) == gh * side && images.size(3) == gw * side,
                  "images must divide into a grid of ", gh, " x ", gw,
                  " square blocks of side 1, 2, 4, 8, 16 or 32");
  GatherVisibleParams p;
  p.images = images.const_data_ptr();
  p.block_index = block_index.const_data_ptr<int64_t>();
  p.blocks = block_index.size(0);
  p.channels = images.size(1);
  p.grid_rows = gh;
  p.grid_columns = gw;
  p.stride_batch = images.stride(0);
  p.stride_channel = images.stride(1);
  p.stride_row = images.stride(2);
  p.stride_column = images.stride(3);
  p.side = int(side);
  p.element_size = int(images.element_size());
  y = torch::stable::new_empty(images, {p.blocks, side * side, p.channels});
  p.y = y.mutable_data_ptr();
  return p;
}

Tensor gather_visible(const Tensor& images, const Tensor& block_index_, int64_t gh, int64_t gw) {
  const Tensor block_index = torch::stable::contiguous(block_index_);
  Tensor y;
  const GatherVisibleParams p = fill_params(images, block_index, gh, gw, y);
  for (int64_t i = 0, count = images.size(0) * gh * gw; i < p.blocks; ++i) {
    STD_TORCH_CHECK(p.block_index[i] >= 0 && p.block_index[i] < count, "block_index holds ",
                    p.block_index[i], ", but there are ", count, " blocks");
  }
  torch::stable::parallel_for(
      0, p.blocks, grain(p.side * p.side * p.channels),
      [&](int64_t begin, int64_t end) { cpu::gather_visible(p, begin, end); });
  return y;
}

#ifdef WITH_CUDA
Tensor gather_visible_cuda(const Tensor& images, const Tensor& block_index_, int64_t gh,
                           int64_t gw) {
  const OnDevice device(images);
  const Tensor block_index = torch::stable::contiguous(block_index_);
  Tensor y;
  const GatherVisibleParams p = fill_params(images, block_index, gh, gw, y);
  device.check(cuda::gather_visible(p, device.stream()));
  return y;
}
#endif

}  // namespace
}  // namespace convmae

STABLE_TORCH_LIBRARY_IMPL(convmae, CPU, m) {
  m.impl("gather_visible", TORCH_BOX(&convmae::gather_visible));
}

#ifdef WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(convmae, CUDA, m) {
  m.impl("gather_visible", TORCH_BOX(&convmae::gather_visible_cuda));
}
#endif
