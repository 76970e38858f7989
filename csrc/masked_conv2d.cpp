// Depthwise convolution of packed features: checks, allocation, registration.
#include "masked_conv2d.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "common.h"
#include "cuda/plan.h"

namespace convmae {
namespace {

// Chooses the kind of CPU kernel, and makes its `window`, which must outlive `p`.
std::vector<Place> make_window(cpu::MaskedConv2dWindow& p) {
  const auto bytes = [](auto isa) { return vector_bytes(isa); };
  p.tile_side = cpu::MaskedConv2dWindow::choose_tile_side(p, with_isa(bytes));
  std::vector<Place> window;
  if (p.tile_side > 0) {
    const int across = p.side / p.tile_side;
    for (int tile = 0; tile < across * across; ++tile) {
      for (int i = -p.reach(); i <= p.reach(); ++i) {
        for (int j = -p.reach(); j <= p.reach(); ++j) {
          window.push_back(place((zorder_row(tile) + i) * p.tile_side,
                                 (zorder_column(tile) + j) * p.tile_side, p.side, p.radius));
        }
      }
    }
  } else {
    window.reserve(size_t(p.window_rows()) * p.window_columns());
    for (int row = -p.halo_rows(); row < p.side + p.halo_rows(); ++row) {
      for (int column = -p.halo_columns(); column < p.side + p.halo_columns(); ++column) {
        window.push_back(place(row, column, p.side, p.radius));
      }
    }
  }
  p.window = window.data();
  return window;
}

// Fills in what forward and weight gradient share. `x` and `neighbours` must be contiguous.
void fill_params(MaskedConv2dParams& p, const Tensor& x, const Tensor& neighbours,
                 int64_t kernel_rows, int64_t kernel_columns,
                 const std::vector<int64_t>& dilation) {
  check_same_device(neighbours, "neighbours", x);
  check_floating(x, "x");
  STD_TORCH_CHECK(x.dim() == 3, "x must be [T, s*s, C]");
  STD_TORCH_CHECK(neighbours.dim() == 2 && neighbours.size(0) == x.size(0) &&
                      neighbours.scalar_type() == ScalarType::Int,
                  "neighbours must be int32 [T, (2 * radius + 1) ** 2]");
  STD_TORCH_CHECK(dilation.size() == 2 && dilation[0] >= 1 && dilation[1] >= 1,
                  "dilation must be two positive integers");
  STD_TORCH_CHECK(kernel_rows % 2 == 1 && kernel_columns % 2 == 1, "kernel sides must be odd");
  p.dtype = dtype_of(x);
  p.blocks = x.size(0);
  p.channels = x.size(2);
  p.table_columns = neighbours.size(1);
  p.side = int(std::lround(std::sqrt(double(x.size(1)))));
  p.kernel_rows = int(kernel_rows);
  p.kernel_columns = int(kernel_columns);
  p.dilation_rows = int(dilation[0]);
  p.dilation_columns = int(dilation[1]);
  STD_TORCH_CHECK(p.side >= 1 && p.side <= 32 && (p.side & (p.side - 1)) == 0 &&
                      int64_t(p.side) * p.side == x.size(1),
                  "block sides are 1, 2, 4, 8, 16 or 32");
  p.radius = (int(std::lround(std::sqrt(double(p.table_columns)))) - 1) / 2;
  STD_TORCH_CHECK(int64_t(2 * p.radius + 1) * (2 * p.radius + 1) == p.table_columns &&
                      int64_t(p.radius) * p.side >= std::max(p.halo_rows(), p.halo_columns()),
                  "neighbours does not reach as far as the kernel");
  p.x = x.const_data_ptr();
  p.neighbours = neighbours.const_data_ptr<int32_t>();
}

void check_weight(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_same_device(weight, "weight", x);
  STD_TORCH_CHECK(
      x.dim() == 3 && weight.dim() == 4 && weight.size(0) == x.size(2) && weight.size(1) == 1,
      "weight must be [C, 1, kh, kw]");
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "weight must have the dtype of x");
  if (!bias.has_value()) return;
  check_same_device(*bias, "bias", x);
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == x.size(2), "bias must be [C]");
}

// Contiguous, in the dtype of x.
std::optional<Tensor> contiguous_bias(const std::optional<Tensor>& bias, const Tensor& x) {
  if (!bias.has_value()) return std::nullopt;
  return torch::stable::contiguous(torch::stable::to(*bias, x.scalar_type()));
}

Tensor masked_conv2d(const Tensor& x_, const Tensor& weight_, std::optional<Tensor> bias_,
                     const Tensor& neighbours_, std::vector<int64_t> dilation) {
  const Tensor x = torch::stable::contiguous(x_), weight = torch::stable::contiguous(weight_);
  const Tensor neighbours = torch::stable::contiguous(neighbours_);
  check_weight(x, weight, bias_);
  const std::optional<Tensor> bias = contiguous_bias(bias_, x);
  cpu::MaskedConv2dForward p;
  fill_params(p, x, neighbours, weight.size(2), weight.size(3), dilation);
  const std::vector<Place> window = make_window(p);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  p.weight = weight.const_data_ptr();
  p.bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr();
  const auto compute = with_isa([](auto isa) { return cpu::masked_conv2d<isa>; });
  torch::stable::parallel_for(0, p.blocks, grain(x.size(1) * p.channels),
                              [&](int64_t begin, int64_t end) { compute(p, begin, end); });
  return y;
}

void check_grad(const Tensor& grad, const Tensor& x, const std::vector<int64_t>& kernel) {
  STD_TORCH_CHECK(kernel.size() == 2, "kernel must be two odd integers");
  check_same_device(grad, "grad", x);
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type() && grad.dim() == 3 && x.dim() == 3 &&
                      grad.size(0) == x.size(0) && grad.size(1) == x.size(1) &&
                      grad.size(2) == x.size(2),
                  "grad must have the shape and dtype of x");
}

// The blocks are cut into parts whose number depends on their own number alone, and the parts are
// added up in order: the same bits whatever the number of threads.
constexpr int64_t kBlocksPerPart = 16, kMaxParts = 64;

// [1 + taps, channels] in the accumulation type to the gradients of the weight, [channels, taps],
// and of the bias, [channels], in the dtype of x.
template <class T>
void round_sums(const Tensor& sums, int64_t taps, Tensor& grad_weight, Tensor& grad_bias) {
  const Acc<T>* const sum = static_cast<const Acc<T>*>(sums.const_data_ptr());
  T* to = static_cast<T*>(grad_weight.mutable_data_ptr());
  T* const bias = static_cast<T*>(grad_bias.mutable_data_ptr());
  const int64_t channels = grad_bias.size(0);
  for (int64_t c = 0; c < channels; ++c) {
    from_acc(sum[c], bias + c);
    for (int64_t tap = 1; tap <= taps; ++tap) from_acc(sum[tap * channels + c], to++);
  }
}

// Without `grad_x`, that of x is not computed.
std::tuple<Tensor, Tensor> compute_grads(const Tensor& grad, const Tensor& x, const Tensor* weight,
                                         const Tensor& neighbours_, int64_t kernel_rows,
                                         int64_t kernel_columns,
                                         const std::vector<int64_t>& dilation, Tensor* grad_x) {
  const Tensor neighbours = torch::stable::contiguous(neighbours_);
  cpu::MaskedConv2dGrads p;
  fill_params(p, x, neighbours, kernel_rows, kernel_columns, dilation);
  const std::vector<Place> window = make_window(p);
  const int64_t taps = kernel_rows * kernel_columns;
  p.parts = std::clamp<int64_t>((p.blocks + kBlocksPerPart - 1) / kBlocksPerPart, 1, kMaxParts);
  const ScalarType acc = accumulation_type(x);
  Tensor partial = torch::stable::new_empty(x, {p.parts, (1 + taps) * p.channels}, acc);
  Tensor sums = torch::stable::new_empty(x, {(1 + taps) * p.channels}, acc);
  p.grad = grad.const_data_ptr();
  p.weight = weight == nullptr ? nullptr : weight->const_data_ptr();
  p.grad_x = grad_x == nullptr ? nullptr : grad_x->mutable_data_ptr();
  p.partial = partial.mutable_data_ptr();
  const auto compute = with_isa([](auto isa) { return cpu::masked_conv2d_grads<isa>; });
  torch::stable::parallel_for(0, p.parts, 1,
                              [&](int64_t first, int64_t last) { compute(p, first, last); });
  add_parts(partial, sums);
  Tensor grad_weight = torch::stable::new_empty(x, {p.channels, 1, kernel_rows, kernel_columns});
  Tensor grad_bias = torch::stable::new_empty(x, {p.channels});
  with_type(p.dtype,
            [&](auto type) { round_sums<decltype(type)>(sums, taps, grad_weight, grad_bias); });
  return {grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor> masked_conv2d_weight_grad(const Tensor& grad_, const Tensor& x_,
                                                     const Tensor& neighbours,
                                                     std::vector<int64_t> kernel,
                                                     std::vector<int64_t> dilation) {
  const Tensor grad = torch::stable::contiguous(grad_), x = torch::stable::contiguous(x_);
  check_grad(grad, x, kernel);
  return compute_grads(grad, x, nullptr, neighbours, kernel[0], kernel[1], dilation, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> masked_conv2d_grads(const Tensor& grad_, const Tensor& x_,
                                                       const Tensor& weight_,
                                                       const Tensor& neighbours,
                                                       std::vector<int64_t> dilation) {
  const Tensor grad = torch::stable::contiguous(grad_), x = torch::stable::contiguous(x_);
  const Tensor weight = torch::stable::contiguous(weight_);
  check_weight(x, weight, std::nullopt);
  check_grad(grad, x, {weight.size(2), weight.size(3)});
  Tensor grad_x = torch::stable::new_empty(x, x.sizes());
  auto [grad_weight, grad_bias] = compute_grads(grad, x, &weight, neighbours, weight.size(2),
                                                weight.size(3), dilation, &grad_x);
  return {grad_x, grad_weight, grad_bias};
}

#ifdef WITH_CUDA
// Its tensors must be contiguous.
Tensor convolve_cuda(const OnDevice& device, const Tensor& x, const Tensor& weight,
                     std::optional<Tensor> bias, const Tensor& neighbours,
                     const std::vector<int64_t>& dilation, bool flipped) {
  cuda::MaskedConv2dForward p;
  fill_params(p, x, neighbours, weight.size(2), weight.size(3), dilation);
  bias = contiguous_bias(bias, x);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  p.flipped = flipped;
  p.weight = weight.const_data_ptr();
  p.bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr();
  cuda::plan_forward(p);
  if (p.kernel == cuda::Kernel::Tensor) {
    const int64_t blocks = cuda::masked_conv2d_tensor_blocks(p);
    if (blocks > 0) {
      cuda::cut_forward(p, blocks);
      device.check(cuda::masked_conv2d_tensor(p, device.stream()));
      return y;
    }
    cuda::plan_forward(p, false);  // a GPU without them, or with too little shared memory
  }
  if (p.kernel == cuda::Kernel::Tiles) cuda::cut_forward(p, cuda::masked_conv2d_warps(p));
  device.check(cuda::masked_conv2d(p, device.stream()));
  return y;
}

Tensor masked_conv2d_cuda(const Tensor& x_, const Tensor& weight_, std::optional<Tensor> bias,
                          const Tensor& neighbours_, std::vector<int64_t> dilation) {
  const OnDevice device(x_);
  const Tensor x = torch::stable::contiguous(x_), weight = torch::stable::contiguous(weight_);
  const Tensor neighbours = torch::stable::contiguous(neighbours_);
  check_weight(x, weight, bias);
  return convolve_cuda(device, x, weight, bias, neighbours, dilation, false);
}

// The results of a weight gradient on the GPU, and the shares that it sums.
struct WeightGradTensors {
  Tensor partial, weight, bias;

  WeightGradTensors(cuda::MaskedConv2dWeightGrad& p, const Tensor& x)
      : partial(torch::stable::new_empty(
            x, {p.shares, 1 + int64_t(p.kernel_rows) * p.kernel_columns, p.channels},
            accumulation_type(x))),
        weight(torch::stable::new_empty(x, {p.channels, 1, p.kernel_rows, p.kernel_columns})),
        bias(torch::stable::new_empty(x, {p.channels})) {
    p.partial = partial.mutable_data_ptr();
    p.grad_weight = weight.mutable_data_ptr();
    p.grad_bias = bias.mutable_data_ptr();
  }
};

// Its tensors must be contiguous.
std::tuple<Tensor, Tensor> reduce_cuda(const OnDevice& device, const Tensor& grad, const Tensor& x,
                                       const Tensor& neighbours, int64_t kernel_rows,
                                       int64_t kernel_columns,
                                       const std::vector<int64_t>& dilation) {
  cuda::MaskedConv2dWeightGrad p;
  fill_params(p, x, neighbours, kernel_rows, kernel_columns, dilation);
  p.grad = grad.const_data_ptr();
  cuda::plan_weight_grad(p);
  const WeightGradTensors results(p, x);
  device.check(cuda::masked_conv2d_weight_grad(p, device.stream()));
  return {results.weight, results.bias};
}

std::tuple<Tensor, Tensor> masked_conv2d_weight_grad_cuda(const Tensor& grad_, const Tensor& x_,
                                                          const Tensor& neighbours_,
                                                          std::vector<int64_t> kernel,
                                                          std::vector<int64_t> dilation) {
  const OnDevice device(x_);
  const Tensor grad = torch::stable::contiguous(grad_), x = torch::stable::contiguous(x_);
  const Tensor neighbours = torch::stable::contiguous(neighbours_);
  check_grad(grad, x, kernel);
  return reduce_cuda(device, grad, x, neighbours, kernel[0], kernel[1], dilation);
}

std::tuple<Tensor, Tensor, Tensor> masked_conv2d_grads_cuda(const Tensor& grad_, const Tensor& x_,
                                                            const Tensor& weight_,
                                                            const Tensor& neighbours_,
                                                            std::vector<int64_t> dilation) {
  const OnDevice device(x_);
  const Tensor grad = torch::stable::contiguous(grad_), x = torch::stable::contiguous(x_);
  const Tensor weight = torch::stable::contiguous(weight_);
  const Tensor neighbours = torch::stable::contiguous(neighbours_);
  check_weight(x, weight, std::nullopt);
  check_grad(grad, x, {weight.size(2), weight.size(3)});
  cuda::MaskedConv2dGrads p;
  fill_params(p, x, neighbours, weight.size(2), weight.size(3), dilation);
  Tensor grad_x = torch::stable::new_empty(x, x.sizes());
  p.grad = grad.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.grad_x = grad_x.mutable_data_ptr();
  cuda::plan_grads(p);
  if (p.tile_side == 0) {  // one after the other
    grad_x = convolve_cuda(device, grad, weight, std::nullopt, neighbours, dilation, true);
    const auto [grad_weight, grad_bias] =
        reduce_cuda(device, grad, x, neighbours, weight.size(2), weight.size(3), dilation);
    return {grad_x, grad_weight, grad_bias};
  }
  const WeightGradTensors results(p, x);
  device.check(cuda::masked_conv2d_grads(p, device.stream()));
  return {grad_x, results.weight, results.bias};
}
#endif

}  // namespace
}  // namespace convmae

STABLE_TORCH_LIBRARY_IMPL(convmae, CPU, m) {
  m.impl("masked_conv2d", TORCH_BOX(&convmae::masked_conv2d));
  m.impl("masked_conv2d_weight_grad", TORCH_BOX(&convmae::masked_conv2d_weight_grad));
  m.impl("masked_conv2d_grads", TORCH_BOX(&convmae::masked_conv2d_grads));
}

#ifdef WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(convmae, CUDA, m) {
  m.impl("masked_conv2d", TORCH_BOX(&convmae::masked_conv2d_cuda));
  m.impl("masked_conv2d_weight_grad", TORCH_BOX(&convmae::masked_conv2d_weight_grad_cuda));
  m.impl("masked_conv2d_grads", TORCH_BOX(&convmae::masked_conv2d_grads_cuda));
}
#endif
