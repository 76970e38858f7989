// What the host side of every op shares: checks, dtypes, devices. The only header that knows
// libtorch, and of it only the stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "launch.h"
#include "numbers.h"

#ifdef WITH_CUDA
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace convmae {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_same_device(const Tensor& t, const char* name, const Tensor& features) {
  STD_TORCH_CHECK(t.device() == features.device(), name,
                  " must be on the device of the features that the op works on");
}

inline void check_floating(const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 ||
                      type == ScalarType::Half || type == ScalarType::Double,
                  name, " must be float32, bfloat16, float16 or float64");
}

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16: return DType::BFloat16;
    case ScalarType::Half: return DType::Half;
    case ScalarType::Double: return DType::Double;
    default: return DType::Float;
  }
}

// The bits of `value` in a dtype, in the first bytes.
inline uint64_t element_bits(DType dtype, double value) {
  uint64_t bits = 0;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    T element;
    from_acc(Acc<T>(value), &element);
    std::memcpy(&bits, &element, sizeof(T));
  });
  return bits;
}

// Work of at least this many elements is worth a thread.
constexpr int64_t kGrainElements = 1 << 14;

inline int64_t grain(int64_t elements_per_item) {
  const int64_t items = kGrainElements / (elements_per_item > 0 ? elements_per_item : 1);
  return items > 0 ? items : 1;
}

inline ScalarType accumulation_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class A>
void add_parts(const A* partial, int64_t parts, int64_t size, A* sum) {
  torch::stable::parallel_for(0, size, kGrainElements, [&](int64_t begin, int64_t end) {
    std::fill(sum + begin, sum + end, A(0));
    for (int64_t part = 0; part < parts; ++part) {
      for (int64_t i = begin; i < end; ++i) sum[i] += partial[part * size + i];
    }
  });
}

// [parts, size] -> the sum of the parts, in their order, both in an accumulation type.
inline void add_parts(const Tensor& partial, Tensor& sum) {
  const int64_t parts = partial.size(0), size = partial.size(1);
  if (sum.scalar_type() == ScalarType::Double) {
    add_parts(partial.const_data_ptr<double>(), parts, size, sum.mutable_data_ptr<double>());
  } else {
    add_parts(partial.const_data_ptr<float>(), parts, size, sum.mutable_data_ptr<float>());
  }
}

#ifdef WITH_CUDA
}  // namespace convmae

// Absent in a CPU build of torch, where nothing asks for it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace convmae {

// Makes the GPU of a tensor the current one while it lives; `stream` is torch's current one there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) : index_(index_of(t)), guard_(index_) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                    "this build of torch has no CUDA, so no current CUDA stream");
    check(cudaSetDevice(index_), "the GPU of the features");  // for this library's CUDA runtime
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream_));
  }
  cuda::Stream stream() const { return stream_; }
  void check(const cuda::LaunchError& error) const { check(error.code, error.kernel); }

 private:
  static int32_t index_of(const Tensor& features) {
    STD_TORCH_CHECK(features.is_cuda(),
                    "the features must be on the GPU that the other tensors are on");
    return features.get_device_index();
  }
  void check(int code, const char* what) const {
    if (code == cudaErrorNoKernelImageForDevice || code == cudaErrorUnsupportedPtxVersion) {
      int major = 0, minor = 0;
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index_);
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index_);
      STD_TORCH_CHECK(false, what, ": this GPU has compute capability ", major, ".", minor,
                      ", but the compiled library has kernels for " CONVMAE_CUDA_ARCHS
                      " only. Install it again from source with TORCH_CUDA_ARCH_LIST=\"",
                      major, ".", minor, "\", or use impl='reference'.");
    }
    STD_TORCH_CHECK(code == cudaSuccess, what, ": ", cudaGetErrorString(cudaError_t(code)));
  }

  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cuda::Stream stream_ = nullptr;
};
#endif

}  // namespace convmae
