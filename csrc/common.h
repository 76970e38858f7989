// What the host side of every op shares: checks, dtypes, instruction sets. The only header that
// knows libtorch, and of it only the stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace convmae {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_cpu(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be a CPU tensor");
}

inline void check_floating(const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 ||
                      type == ScalarType::Half || type == ScalarType::Double,
                  name, " must be float32, bfloat16, float16 or float64");
}

// Work of at least this many elements is worth a thread.
constexpr int64_t kGrainElements = 1 << 14;

inline int64_t grain(int64_t elements_per_item) {
  const int64_t items = kGrainElements / (elements_per_item > 0 ? elements_per_item : 1);
  return items > 0 ? items : 1;
}

enum class Isa : int { Baseline, Avx2, Avx512 };

// The widest instruction set that this machine has; ATEN_CPU_CAPABILITY, which torch obeys too, can
// ask for less ("default" or "avx2").
inline Isa cpu_isa() {
  static const Isa isa = [] {
#if defined(__x86_64__)
    const char* asked = std::getenv("ATEN_CPU_CAPABILITY");
    const bool baseline = asked != nullptr && std::strcmp(asked, "default") == 0;
    const bool at_most_avx2 = asked != nullptr && std::strcmp(asked, "avx2") == 0;
    if (!baseline && !at_most_avx2 && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
      return Isa::Avx512;
    }
    if (!baseline && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c")) {
      return Isa::Avx2;
    }
#endif
    return Isa::Baseline;
  }();
  return isa;
}

}  // namespace convmae
