// What the plan of the CUDA kernels decides, told without a GPU; and choices that overrule it.
#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "common.h"
#include "cuda/plan.h"

namespace convmae {
namespace {

using Numbers = std::vector<int64_t>;

// The ops with several kernels, and the names of these.
const std::map<std::string, std::vector<std::string>> kKernels = {
    {"masked_conv2d", {"any", "tiles", "tensor"}},
    {"masked_conv2d_grads", {"any", "tiles"}},
    {"masked_conv2d_weight_grad", {"any", "tiles"}},
};

DType dtype_named(const std::string& name) {
  if (name == "bfloat16") return DType::BFloat16;
  if (name == "float16") return DType::Half;
  if (name == "float64") return DType::Double;
  STD_TORCH_CHECK(name == "float32", "dtype must be float32, bfloat16, float16 or float64");
  return DType::Float;
}

// The names of an op's kernels, apart by commas; empty: there are no several.
std::string kernel_names(std::string op) {
  const auto found = kKernels.find(op);
  std::string all;
  if (found == kKernels.end()) return all;
  for (const std::string& name : found->second) all += (all.empty() ? "" : ",") + name;
  return all;
}

int64_t clear_kernel_choices() {
  cuda::kernel_choices().clear();
  return 0;
}

// From now on `kernel` computes the op for these shapes, if it can. The first choice that covers a
// shape counts.
int64_t set_kernel_choice(std::string op, std::string dtype, int64_t side, Numbers kernel,
                          int64_t least_channels, int64_t most_channels, bool wide,
                          std::string name) {
  const auto found = kKernels.find(op);
  STD_TORCH_CHECK(found != kKernels.end(), op, " has no kernels to choose from");
  const std::vector<std::string>& names = found->second;
  STD_TORCH_CHECK(std::find(names.begin(), names.end(), name) != names.end(), op, " has no kernel ",
                  name);
  STD_TORCH_CHECK(kernel.size() == 2, "kernel must be two integers");
  cuda::kernel_choices().add({std::move(op), dtype_named(dtype), int(side), int(kernel[0]),
                              int(kernel[1]), least_channels, most_channels, wide,
                              std::move(name)});
  return 0;
}

// The shape of a problem; its tensors begin at `address`, of which the last bits alone count.
void fill_shape(MaskedConv2dParams& p, DType dtype, int64_t blocks, int64_t channels, int64_t side,
                const Numbers& kernel, const Numbers& dilation, int64_t address) {
  STD_TORCH_CHECK(side >= 1 && side <= 32 && (side & (side - 1)) == 0,
                  "block sides are 1, 2, 4, 8, 16 or 32");
  STD_TORCH_CHECK(blocks >= 0 && channels >= 0, "sizes must not be negative");
  STD_TORCH_CHECK(kernel.size() == 2 && kernel[0] % 2 == 1 && kernel[1] % 2 == 1,
                  "kernel must be two odd integers");
  STD_TORCH_CHECK(dilation.size() == 2 && dilation[0] >= 1 && dilation[1] >= 1,
                  "dilation must be two positive integers");
  p.dtype = dtype;
  p.blocks = blocks;
  p.channels = channels;
  p.side = int(side);
  p.kernel_rows = int(kernel[0]);
  p.kernel_columns = int(kernel[1]);
  p.dilation_rows = int(dilation[0]);
  p.dilation_columns = int(dilation[1]);
  p.radius = (std::max(p.halo_rows(), p.halo_columns()) + p.side - 1) / p.side;
  p.table_columns = int64_t(2 * p.radius + 1) * (2 * p.radius + 1);
  p.x = reinterpret_cast<const void*>(uintptr_t(address));
  p.neighbours = nullptr;
}

struct Told {
  std::string text;

  void add(const char* name, const std::string& value) { text += name + ("=" + value) + "\n"; }
  void add(const char* name, int64_t value) { add(name, std::to_string(value)); }
};

template <class Params>
cuda::Kernel kernel_of(const Params& p) {
  if constexpr (requires { p.kernel; }) {
    return p.kernel;
  } else {
    return p.tile_side > 0 ? cuda::Kernel::Tiles : cuda::Kernel::Any;
  }
}

// Why this kernel: what was measured, what the shape allows, or both where they contradict.
std::string reason_of(const cuda::MaskedConv2dRuns& p, cuda::Kernel kernel, const std::string& op,
                      std::initializer_list<const void*> tensors) {
  const std::string chosen = cuda::kernel_choices().find(op.c_str(), p);
  if (!chosen.empty() && chosen == cuda::name_of(kernel)) return "a measured table chose it";
  const std::string refused =
      chosen.empty() ? "" : "a measured table chose \"" + chosen + "\", which cannot: ";
  if (const char* const why_not = cuda::why_not_tiles(p, tensors)) return refused + why_not;
  if (kernel == cuda::Kernel::Any) {
    return refused + "one after the other: a thread has no registers for both gradients";
  }
  const char* const how = kernel == cuda::Kernel::Tensor ? " by tensor cores" : "";
  return refused + "a square kernel of " + std::to_string(p.kernel_rows) + how + " on tiles of " +
         std::to_string(p.tile_side) + " x " + std::to_string(p.tile_side);
}

template <class Params>
void tell_plan(Told& told, const Params& p, const std::string& op,
               std::initializer_list<const void*> tensors) {
  const cuda::Kernel kernel = kernel_of(p);
  const bool on_tiles = kernel != cuda::Kernel::Any;
  told.add("kernel", cuda::name_of(kernel));
  told.add("reason", reason_of(p, kernel, op, tensors));
  told.add("tile_side", on_tiles ? p.tile_side : 0);
  told.add("tiles", p.tiles);
  told.add("slices", on_tiles ? p.slices : cuda::ceil_div(p.channels, 32));
  told.add("access_bytes", !on_tiles ? size_of(p.dtype) : p.wide ? 16 : 4);
}

// How many warps of the forward kernel on tiles a GPU holds that has so much shared memory for each
// multiprocessor, if nothing else bounds them: a warp is a thread block and takes 1 KiB more.
int64_t warps_by_shared_memory(const cuda::MaskedConv2dForward& p, int64_t multiprocessors,
                               int64_t shared_bytes) {
  int64_t warps = 0;
  cuda::with_tile_shape(p, [&](auto side, auto kernel) {
    warps = shared_bytes / (int64_t(sizeof(cuda::TileMemory<side, kernel, 0>)) + 1024);
  });
  return multiprocessors * std::clamp<int64_t>(warps, 1, 32);
}

void tell_runs(Told& told, const cuda::MaskedConv2dWeightGrad& p) {
  const int64_t rows = 1 + int64_t(p.kernel_rows) * p.kernel_columns;
  told.add("runs", p.runs);
  told.add("tiles_per_run", p.tiles_per_run);
  told.add("share_bytes", p.shares * rows * p.channels * (p.dtype == DType::Double ? 8 : 4));
}

void tell_weight_grad(Told& told, cuda::MaskedConv2dWeightGrad& p, const std::string& op) {
  p.grad = p.x;
  cuda::plan_weight_grad(p);
  tell_plan(told, p, op, {p.x, p.grad});
  tell_runs(told, p);
}

void tell_grads(Told& told, cuda::MaskedConv2dGrads& p, const std::string& op) {
  p.grad = p.x;
  p.grad_x = const_cast<void*>(p.x);
  cuda::plan_grads(p);
  tell_plan(told, p, op, {p.x, p.grad, p.grad_x});
  if (kernel_of(p) != cuda::Kernel::Any) return tell_runs(told, p);
  cuda::MaskedConv2dWeightGrad apart = p;
  cuda::plan_weight_grad(apart);
  tell_runs(told, apart);
  told.add("more_bytes", p.blocks * p.side * p.side * p.channels * size_of(p.dtype));  // grad again
}

// `device` is the number of a GPU that is there, or -1.
void tell_forward(Told& told, cuda::MaskedConv2dForward& p, const std::string& op,
                  [[maybe_unused]] int64_t device, int64_t multiprocessors, int64_t shared_bytes) {
  p.y = const_cast<void*>(p.x);
  cuda::plan_forward(p);
  int64_t held = -1;  // thread blocks
#ifdef WITH_CUDA
  if (device >= 0 && p.kernel != cuda::Kernel::Any) {
    cudaSetDevice(int(device));
    if (p.kernel == cuda::Kernel::Tensor) {
      held = cuda::masked_conv2d_tensor_blocks(p);
      if (held <= 0) cuda::plan_forward(p, false);  // as the op does
    }
    if (p.kernel == cuda::Kernel::Tiles) held = cuda::masked_conv2d_warps(p);
  }
#endif
  const bool asked = held >= 0;
  if (!asked && p.kernel == cuda::Kernel::Tiles) {
    held = warps_by_shared_memory(p, multiprocessors, shared_bytes);
  }
  if (held >= 0) {
    cuda::cut_forward(p, held);
    told.add("held", held);
    told.add("held_by", asked ? "the GPU" : "shared memory alone");
    told.add("runs", p.runs);
    told.add("tiles_per_run", p.tiles_per_run);
  }
  tell_plan(told, p, op, {p.x, p.y});
}

// What the plan decides for an op on a GPU, as lines "name=value". `device` is the number of a GPU
// that is there; -1: one with these multiprocessors and shared memory for each of them.
std::string explain_kernel(std::string op, std::string dtype, int64_t blocks, int64_t channels,
                           int64_t side, Numbers kernel, Numbers dilation, int64_t address,
                           int64_t device, int64_t multiprocessors, int64_t shared_bytes) {
  STD_TORCH_CHECK(kKernels.count(op) == 1, op, " has no kernels to choose from");
  Told told;
  const auto fill = [&](MaskedConv2dParams& p) {
    fill_shape(p, dtype_named(dtype), blocks, channels, side, kernel, dilation, address);
  };
  if (op == "masked_conv2d_weight_grad") {
    cuda::MaskedConv2dWeightGrad p;
    fill(p);
    tell_weight_grad(told, p, op);
  } else if (op == "masked_conv2d_grads") {
    cuda::MaskedConv2dGrads p;
    fill(p);
    tell_grads(told, p, op);
  } else {
    cuda::MaskedConv2dForward p;
    fill(p);
    tell_forward(told, p, op, device, multiprocessors, shared_bytes);
  }
  return told.text;
}

}  // namespace
}  // namespace convmae

STABLE_TORCH_LIBRARY_IMPL(convmae, CompositeExplicitAutograd, m) {
  m.impl("kernel_names", TORCH_BOX(&convmae::kernel_names));
  m.impl("clear_kernel_choices", TORCH_BOX(&convmae::clear_kernel_choices));
  m.impl("set_kernel_choice", TORCH_BOX(&convmae::set_kernel_choice));
  m.impl("explain_kernel", TORCH_BOX(&convmae::explain_kernel));
}
