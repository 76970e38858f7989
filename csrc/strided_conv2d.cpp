// Depthwise convolution of packed features with a stride, and its gradients: checks, allocation,
// registration.
#include "strided_conv2d.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "common.h"

namespace convmae {
namespace {

// -- checks ---------------------------------------------------------------------------------------

// Fills in `p` for features of blocks of side `side_of(x) * scale`.
void fill_params(StridedConv2dParams& p, const Tensor& x, const char* name, int64_t scale,
                 const Tensor& neighbours, const std::vector<int64_t>& kernel, int64_t stride,
                 const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  check_same_device(neighbours, "neighbours", x);
  check_floating(x, name);
  STD_TORCH_CHECK(x.dim() == 3, name, " must be [T, s*s, C]");
  STD_TORCH_CHECK(neighbours.dim() == 2 && neighbours.size(0) == x.size(0) &&
                      neighbours.scalar_type() == ScalarType::Int,
                  "neighbours must be int32 [T, (2 * radius + 1) ** 2]");
  STD_TORCH_CHECK(kernel.size() == 2 && kernel[0] >= 1 && kernel[1] >= 1,
                  "kernel must be two positive integers");
  STD_TORCH_CHECK(dilation.size() == 2 && dilation[0] >= 1 && dilation[1] >= 1,
                  "dilation must be two positive integers");
  STD_TORCH_CHECK(padding.size() == 2, "padding must be two integers");
  STD_TORCH_CHECK(stride >= 1 && stride <= 32 && (stride & (stride - 1)) == 0,
                  "stride must be a power of two");
  const int64_t own = std::lround(std::sqrt(double(x.size(1)))), side = own * scale;
  STD_TORCH_CHECK(own * own == x.size(1) && side >= 1 && side <= 32 && (side & (side - 1)) == 0,
                  "block sides are 1, 2, 4, 8, 16 or 32");
  STD_TORCH_CHECK(side % stride == 0, "stride must divide the side of the blocks");
  const int64_t n = std::lround(std::sqrt(double(neighbours.size(1))));
  STD_TORCH_CHECK(n * n == neighbours.size(1) && n % 2 == 1, "neighbours is no table");
  p.dtype = dtype_of(x);
  p.neighbours = neighbours.const_data_ptr<int32_t>();
  p.blocks = x.size(0);
  p.channels = x.size(2);
  p.table_columns = neighbours.size(1);
  p.side = int(side);
  p.stride = int(stride);
  p.radius = int(n - 1) / 2;
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t first = -padding[axis];  // what the first and the last output of a block meet
    const int64_t last = side - stride + (kernel[axis] - 1) * dilation[axis] + first;
    STD_TORCH_CHECK(first >= -p.radius * side && last < (p.radius + 1) * side,
                    "neighbours does not reach as far as the kernel");
    p.kernel[axis] = int(kernel[axis]);
    p.padding[axis] = int(padding[axis]);
    p.dilation[axis] = int(dilation[axis]);
  }
}

void check_weight(const Tensor& weight, const Tensor& features) {
  check_same_device(weight, "weight", features);
  STD_TORCH_CHECK(features.dim() == 3 && weight.dim() == 4 && weight.size(0) == features.size(2) &&
                      weight.size(1) == 1,
                  "weight must be [C, 1, kh, kw]");
  STD_TORCH_CHECK(weight.scalar_type() == features.scalar_type(),
                  "weight must have the dtype of the features");
}

void check_bias(const Tensor& bias, const Tensor& x) {
  check_same_device(bias, "bias", x);
  STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == x.size(2), "bias must be [C]");
}

void check_grad(const Tensor& grad, const Tensor& x, int64_t stride) {
  check_same_device(grad, "grad", x);
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type() && grad.dim() == 3 && x.dim() == 3 &&
                      grad.size(0) == x.size(0) && grad.size(2) == x.size(2) &&
                      grad.size(1) * stride * stride == x.size(1),
                  "grad must have the blocks and channels that x has after the stride, and its "
                  "dtype");
}

std::vector<int64_t> kernel_of(const Tensor& weight) { return {weight.size(2), weight.size(3)}; }

// [C, 1, kh, kw] -> [taps, C]
Tensor by_tap(const Tensor& weight) {
  const Tensor flat =
      torch::stable::reshape(weight, {weight.size(0), weight.size(2) * weight.size(3)});
  return torch::stable::transpose(flat, 0, 1);
}

// -- CPU ------------------------------------------------------------------------------------------

// What every position of a block meets, of the outputs or, backwards, of the inputs.
struct Meetings {
  std::vector<cpu::Meeting> all;
  std::vector<int32_t> first;
};

Meetings make_meetings(const StridedConv2dParams& p, bool backwards) {
  const int side = backwards ? p.side : p.outputs_side();
  Meetings meetings;
  meetings.first.push_back(0);
  for (int rank = 0; rank < side * side; ++rank) {
    const int row = zorder_row(rank), column = zorder_column(rank);
    for (int tap = 0; tap < p.taps(); ++tap) {
      const int i = tap / p.kernel[1], j = tap % p.kernel[1];
      const Place met =
          backwards ? met_output(p, row, column, i, j) : met_input(p, row, column, i, j);
      if (met.neighbour >= 0) meetings.all.push_back({tap, met});
    }
    meetings.first.push_back(int32_t(meetings.all.size()));
  }
  return meetings;
}

Tensor multiply(cpu::StridedConv2dProducts& p, const Tensor& source, const Tensor& weight,
                const std::optional<Tensor>& bias, bool backwards) {
  const int64_t side = backwards ? p.side : p.outputs_side();
  const Meetings meetings = make_meetings(p, backwards);
  Tensor table =
      torch::stable::new_empty(source, {1 + p.taps(), p.channels}, accumulation_type(source));
  Tensor bias_row = torch::stable::narrow(table, 0, 0, 1);
  if (bias.has_value()) {
    torch::stable::copy_(bias_row, *bias);
  } else {
    torch::stable::fill_(bias_row, 0.0);
  }
  Tensor tap_rows = torch::stable::narrow(table, 0, 1, p.taps());
  torch::stable::copy_(tap_rows, by_tap(weight));
  Tensor result = torch::stable::new_empty(source, {p.blocks, side * side, p.channels});
  p.meetings = meetings.all.data();
  p.first = meetings.first.data();
  p.positions = side * side;
  p.source_positions = source.size(1);
  p.source = source.const_data_ptr();
  p.weight = table.const_data_ptr();
  p.result = result.mutable_data_ptr();
  const auto compute = with_isa([](auto isa) { return cpu::strided_conv2d<isa>; });
  const int64_t elements = std::max(p.positions, p.source_positions) * p.channels;
  torch::stable::parallel_for(0, p.blocks, grain(elements),
                              [&](int64_t begin, int64_t end) { compute(p, begin, end); });
  return result;
}

Tensor strided_conv2d(const Tensor& x_, const Tensor& weight, std::optional<Tensor> bias,
                      const Tensor& neighbours_, int64_t stride, std::vector<int64_t> padding,
                      std::vector<int64_t> dilation) {
  check_weight(weight, x_);
  if (bias.has_value()) check_bias(*bias, x_);
  const Tensor x = torch::stable::contiguous(x_);
  const Tensor neighbours = torch::stable::contiguous(neighbours_);
  cpu::StridedConv2dProducts p;
  fill_params(p, x, "x", 1, neighbours, kernel_of(weight), stride, padding, dilation);
  return multiply(p, x, weight, bias, false);
}

Tensor strided_conv2d_input_grad(const Tensor& grad_, const Tensor& weight,
                                 const Tensor& neighbours_, int64_t stride,
                                 std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  check_weight(weight, grad_);
  const Tensor grad = torch::stable::contiguous(grad_);
  const Tensor neighbours = torch::stable::contiguous(neighbours_);
  cpu::StridedConv2dProducts p;
  fill_params(p, grad, "grad", stride, neighbours, kernel_of(weight), stride, padding, dilation);
  return multiply(p, grad, weight, std::nullopt, true);
}

// The blocks are cut into parts whose number depends on the problem alone, and the parts are added
// up in order: the same bits whatever the number of threads.
constexpr int64_t kInputsPerPart = 512, kMaxParts = 64;

std::tuple<Tensor, Tensor> strided_conv2d_weight_grad(const Tensor& grad_, const Tensor& x_,
                                                      const Tensor& neighbours_,
                                                      std::vector<int64_t> kernel, int64_t stride,
                                                      std::vector<int64_t> padding,
                                                      std::vector<int64_t> dilation) {
  check_grad(grad_, x_, stride);
  const Tensor grad = torch::stable::contiguous(grad_), x = torch::stable::contiguous(x_);
  const Tensor neighbours = torch::stable::contiguous(neighbours_);
  cpu::StridedConv2dWeightGrad p;
  fill_params(p, x, "x", 1, neighbours, kernel, stride, padding, dilation);
  const Meetings meetings = make_meetings(p, false);
  p.meetings = meetings.all.data();
  p.first = meetings.first.data();
  p.positions = grad.size(1);
  p.source_positions = x.size(1);
  p.source = x.const_data_ptr();
  p.grad = grad.const_data_ptr();

  const ScalarType acc = accumulation_type(x);
  const int64_t taps = p.taps(), size = (1 + taps) * p.channels;
  const int64_t parts = std::clamp<int64_t>(p.blocks * x.size(1) / kInputsPerPart, 1, kMaxParts);
  Tensor partial = torch::stable::new_empty(x, {parts, size}, acc);
  torch::stable::fill_(partial, 0.0);
  Tensor sum = torch::stable::new_empty(x, {1 + taps, p.channels}, acc);
  char* const data = static_cast<char*>(partial.mutable_data_ptr());
  const int64_t bytes = size * int64_t(partial.element_size());
  const auto compute = with_isa([](auto isa) { return cpu::strided_conv2d_weight_grad<isa>; });
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      compute(p, data + part * bytes, part * p.blocks / parts, (part + 1) * p.blocks / parts);
    }
  });
  add_parts(partial, sum);
  Tensor grad_weight = torch::stable::new_empty(x, {p.channels, 1, kernel[0], kernel[1]});
  Tensor grad_bias = torch::stable::new_empty(x, {p.channels});
  Tensor rows = by_tap(grad_weight);
  torch::stable::copy_(rows, torch::stable::narrow(sum, 0, 1, taps));
  torch::stable::copy_(grad_bias,
                       torch::stable::reshape(torch::stable::narrow(sum, 0, 0, 1), {p.channels}));
  return {grad_weight, grad_bias};
}

// -- CUDA -----------------------------------------------------------------------------------------

#ifdef WITH_CUDA
Tensor multiply_cuda(const OnDevice& device, cuda::StridedConv2dProducts& p, const Tensor& source,
                     const Tensor& weight, const std::optional<Tensor>& bias, bool backwards) {
  const int64_t side = backwards ? p.side : p.outputs_side();
  const Tensor taps = torch::stable::contiguous(by_tap(weight));
  std::optional<Tensor> bias_row;
  if (bias.has_value()) {
    bias_row = torch::stable::contiguous(torch::stable::to(*bias, source.scalar_type()));
  }
  Tensor result = torch::stable::new_empty(source, {p.blocks, side * side, p.channels});
  p.backwards = backwards;
  p.source = source.const_data_ptr();
  p.weight = taps.const_data_ptr();
  p.bias = bias_row.has_value() ? bias_row->const_data_ptr() : nullptr;
  p.result = result.mutable_data_ptr();
  device.check(cuda::strided_conv2d(p, device.stream()));
  return result;
}

Tensor strided_conv2d_cuda(const Tensor& x_, const Tensor& weight, std::optional<Tensor> bias,
                           const Tensor& neighbours_, int64_t stride, std::vector<int64_t> padding,
                           std::vector<int64_t> dilation) {
  const OnDevice device(x_);
  check_weight(weight, x_);
  if (bias.has_value()) check_bias(*bias, x_);
  const Tensor x = torch::stable::contiguous(x_);
  const Tensor neighbours = torch::stable::contiguous(neighbours_);
  cuda::StridedConv2dProducts p;
  fill_params(p, x, "x", 1, neighbours, kernel_of(weight), stride, padding, dilation);
  return multiply_cuda(device, p, x, weight, bias, false);
}

Tensor strided_conv2d_input_grad_cuda(const Tensor& grad_, const Tensor& weight,
                                      const Tensor& neighbours_, int64_t stride,
                                      std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  const OnDevice device(grad_);
  check_weight(weight, grad_);
  const Tensor grad = torch::stable::contiguous(grad_);
  const Tensor neighbours = torch::stable::contiguous(neighbours_);
  cuda::StridedConv2dProducts p;
  fill_params(p, grad, "grad", stride, neighbours, kernel_of(weight), stride, padding, dilation);
  return multiply_cuda(device, p, grad, weight, std::nullopt, true);
}

std::tuple<Tensor, Tensor> strided_conv2d_weight_grad_cuda(
    const Tensor& grad_, const Tensor& x_, const Tensor& neighbours_, std::vector<int64_t> kernel,
    int64_t stride, std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  const OnDevice device(x_);
  check_grad(grad_, x_, stride);
  const Tensor grad = torch::stable::contiguous(grad_), x = torch::stable::contiguous(x_);
  const Tensor neighbours = torch::stable::contiguous(neighbours_);
  cuda::StridedConv2dWeightGrad p;
  fill_params(p, x, "x", 1, neighbours, kernel, stride, padding, dilation);
  cuda::plan_strided_weight_grad(p);
  Tensor partial =
      torch::stable::new_empty(x, {p.runs, 1 + p.taps(), p.channels}, accumulation_type(x));
  Tensor grad_weight = torch::stable::new_empty(x, {p.channels, 1, kernel[0], kernel[1]});
  Tensor grad_bias = torch::stable::new_empty(x, {p.channels});
  p.x = x.const_data_ptr();
  p.grad = grad.const_data_ptr();
  p.partial = partial.mutable_data_ptr();
  p.grad_weight = grad_weight.mutable_data_ptr();
  p.grad_bias = grad_bias.mutable_data_ptr();
  device.check(cuda::strided_conv2d_weight_grad(p, device.stream()));
  return {grad_weight, grad_bias};
}
#endif

}  // namespace
}  // namespace convmae

STABLE_TORCH_LIBRARY_IMPL(convmae, CPU, m) {
  m.impl("strided_conv2d", TORCH_BOX(&convmae::strided_conv2d));
  m.impl("strided_conv2d_input_grad", TORCH_BOX(&convmae::strided_conv2d_input_grad));
  m.impl("strided_conv2d_weight_grad", TORCH_BOX(&convmae::strided_conv2d_weight_grad));
}

#ifdef WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(convmae, CUDA, m) {
  m.impl("strided_conv2d", TORCH_BOX(&convmae::strided_conv2d_cuda));
  m.impl("strided_conv2d_input_grad", TORCH_BOX(&convmae::strided_conv2d_input_grad_cuda));
  m.impl("strided_conv2d_weight_grad", TORCH_BOX(&convmae::strided_conv2d_weight_grad_cuda));
}
#endif
