// Asks the machine for its instruction sets.
#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace convmae {

Isa cpu_isa() {
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
