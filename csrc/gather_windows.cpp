// Each visible block with the positions around it: checks, allocation, registration.
#include "gather_windows.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "common.h"

namespace convmae {
namespace {

// Fills in all but `from`, `to` and `fill`. `features` has the dtype and the channels, last.
GatherWindowsParams fill_params(const Tensor& features, const Tensor& neighbours, int64_t side,
                                const std::vector<int64_t>& halo) {
  check_same_device(neighbours, "neighbours", features);
  check_floating(features, "the features");
  STD_TORCH_CHECK(neighbours.dim() == 2 && neighbours.size(0) == features.size(0) &&
                      neighbours.scalar_type() == ScalarType::Int,
                  "neighbours must be int32 [T, (2 * radius + 1) ** 2]");
  STD_TORCH_CHECK(side >= 1 && side <= 32 && (side & (side - 1)) == 0,
                  "block sides are 1, 2, 4, 8, 16 or 32");
  STD_TORCH_CHECK(halo.size() == 4, "halo must be four integers: top, bottom, left, right");
  const int64_t rows = halo[0] + side + halo[1], columns = halo[2] + side + halo[3];
  const int64_t n = std::lround(std::sqrt(double(neighbours.size(1))));
  const int64_t reach = (n - 1) / 2 * side;
  for (int64_t positions : halo) {
    STD_TORCH_CHECK(positions <= reach && positions > -side, "a halo of ", positions,
                    " positions does not fit blocks of side ", side, " with neighbours as far as ",
                    reach);
  }
  STD_TORCH_CHECK(n * n == neighbours.size(1) && n % 2 == 1 && rows > 0 && columns > 0,
                  "halo leaves no window, or neighbours is no table");
  GatherWindowsParams p = {};
  p.neighbours = neighbours.const_data_ptr<int32_t>();
  p.blocks = features.size(0);
  p.channels = features.size(features.dim() - 1);
  p.side = int(side);
  p.radius = int(n - 1) / 2;
  p.top = int(halo[0]);
  p.left = int(halo[2]);
  p.rows = int(rows);
  p.columns = int(columns);
  p.dtype = dtype_of(features);
  return p;
}

// Fills in all but `fill`; `x` and `neighbours` must be contiguous.
GatherWindowsParams window_params(const Tensor& x, const Tensor& neighbours,
                                  const std::vector<int64_t>& halo, Tensor& windows) {
  STD_TORCH_CHECK(x.dim() == 3, "x must be [T, s*s, C]");
  const int64_t side = std::lround(std::sqrt(double(x.size(1))));
  STD_TORCH_CHECK(side * side == x.size(1), "x must be [T, s*s, C]");
  GatherWindowsParams p = fill_params(x, neighbours, side, halo);
  windows = torch::stable::new_empty(x, {p.blocks, p.rows, p.columns, p.channels});
  p.from = x.const_data_ptr();
  p.to = windows.mutable_data_ptr();
  return p;
}

// The same for the gradient.
GatherWindowsParams grad_params(const Tensor& grad, const Tensor& neighbours,
                                const std::vector<int64_t>& halo, Tensor& y) {
  STD_TORCH_CHECK(grad.dim() == 4 && halo.size() == 4,
                  "grad must be [T, top + s + bottom, left + s + right, C]");
  GatherWindowsParams p = fill_params(grad, neighbours, grad.size(1) - halo[0] - halo[1], halo);
  STD_TORCH_CHECK(p.columns == grad.size(2),
                  "grad must be [T, top + s + bottom, left + s + right, C]");
  y = torch::stable::new_empty(grad, {p.blocks, int64_t(p.side) * p.side, p.channels});
  p.from = grad.const_data_ptr();
  p.to = y.mutable_data_ptr();
  return p;
}

Tensor gather_windows(const Tensor& x_, const Tensor& neighbours_, std::vector<int64_t> halo,
                      double fill) {
  const Tensor x = torch::stable::contiguous(x_);
  const Tensor neighbours = torch::stable::contiguous(neighbours_);
  Tensor windows;
  GatherWindowsParams p = window_params(x, neighbours, halo, windows);
  const uint64_t bits = element_bits(p.dtype, fill);
  p.fill = &bits;
  torch::stable::parallel_for(
      0, p.blocks, grain(int64_t(p.rows) * p.columns * p.channels),
      [&](int64_t begin, int64_t end) { cpu::gather_windows(p, begin, end); });
  return windows;
}

Tensor gather_windows_grad(const Tensor& grad_, const Tensor& neighbours_,
                           std::vector<int64_t> halo) {
  const Tensor grad = torch::stable::contiguous(grad_);
  const Tensor neighbours = torch::stable::contiguous(neighbours_);
  Tensor y;
  const GatherWindowsParams p = grad_params(grad, neighbours, halo, y);
  const auto compute = with_isa([](auto isa) { return cpu::gather_windows_grad<isa>; });
  torch::stable::parallel_for(0, p.blocks, grain(int64_t(p.rows) * p.columns * p.channels),
                              [&](int64_t begin, int64_t end) { compute(p, begin, end); });
  return y;
}

#ifdef WITH_CUDA
Tensor gather_windows_cuda(const Tensor& x_, const Tensor& neighbours_, std::vector<int64_t> halo,
                           double fill) {
  const OnDevice device(x_);
  const Tensor x = torch::stable::contiguous(x_);
  const Tensor neighbours = torch::stable::contiguous(neighbours_);
  Tensor windows;
  GatherWindowsParams p = window_params(x, neighbours, halo, windows);
  const uint64_t bits = element_bits(p.dtype, fill);
  p.fill = &bits;
  device.check(cuda::gather_windows(p, device.stream()));
  return windows;
}

Tensor gather_windows_grad_cuda(const Tensor& grad_, const Tensor& neighbours_,
                                std::vector<int64_t> halo) {
  const OnDevice device(grad_);
  const Tensor grad = torch::stable::contiguous(grad_);
  const Tensor neighbours = torch::stable::contiguous(neighbours_);
  Tensor y;
  const GatherWindowsParams p = grad_params(grad, neighbours, halo, y);
  device.check(cuda::gather_windows_grad(p, device.stream()));
  return y;
}
#endif

}  // namespace
}  // namespace convmae

STABLE_TORCH_LIBRARY_IMPL(convmae, CPU, m) {
  m.impl("gather_windows", TORCH_BOX(&convmae::gather_windows));
  m.impl("gather_windows_grad", TORCH_BOX(&convmae::gather_windows_grad));
}

#ifdef WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(convmae, CUDA, m) {
  m.impl("gather_windows", TORCH_BOX(&convmae::gather_windows_cuda));
  m.impl("gather_windows_grad", TORCH_BOX(&convmae::gather_windows_grad_cuda));
}
#endif
