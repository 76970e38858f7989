// The neighbour table of a mask on a GPU: checks, allocation, registration. Elsewhere the reference
// serves.
#ifdef WITH_CUDA
#include "neighbour_table.h"

#include "common.h"

namespace convmae {
namespace {

Tensor neighbour_table_cuda(const Tensor& visible_, const Tensor& block_index_, int64_t radius) {
  const OnDevice device(visible_);
  const Tensor visible = torch::stable::contiguous(visible_);
  const Tensor block_index = torch::stable::contiguous(block_index_);
  check_same_device(block_index, "block_index", visible);
  STD_TORCH_CHECK(visible.dim() == 3 && visible.scalar_type() == ScalarType::Bool,
                  "visible must be bool [B, gh, gw]");
  STD_TORCH_CHECK(block_index.dim() == 1 && block_index.scalar_type() == ScalarType::Long,
                  "block_index must be int64 [T]");
  STD_TORCH_CHECK(radius >= 0, "radius must not be negative, got ", radius);
  const int64_t side = 2 * radius + 1;
  Tensor table =
      torch::stable::new_empty(visible, {block_index.size(0), side * side}, ScalarType::Int);
  NeighbourTableParams p;
  p.visible = visible.const_data_ptr<bool>();
  p.block_index = block_index.const_data_ptr<int64_t>();
  p.table = table.mutable_data_ptr<int32_t>();
  p.blocks = block_index.size(0);
  p.grid_rows = visible.size(1);
  p.grid_columns = visible.size(2);
  p.radius = radius;
  device.check(cuda::neighbour_table(p, device.stream()));
  return table;
}

}  // namespace
}  // namespace convmae

STABLE_TORCH_LIBRARY_IMPL(convmae, CUDA, m) {
  m.impl("neighbour_table", TORCH_BOX(&convmae::neighbour_table_cuda));
}
#endif
