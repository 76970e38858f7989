// What the library was compiled for, for people.
#include <string>

#include "common.h"
#include "isa.h"

namespace convmae {
namespace {

// The instruction set of the CPU kernels.
std::string cpu_capability() {
  switch (cpu_isa()) {
    case Isa::Avx512: return "AVX-512";
    case Isa::Avx2: return "AVX2";
    case Isa::Baseline: break;
  }
  return "baseline";
}

// The compute capabilities that the CUDA kernels were compiled for; empty: there are none.
std::string cuda_architectures() {
#ifdef WITH_CUDA
  return CONVMAE_CUDA_ARCHS;
#else
  return "";
#endif
}

}  // namespace
}  // namespace convmae

STABLE_TORCH_LIBRARY_IMPL(convmae, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&convmae::cpu_capability));
  m.impl("cuda_architectures", TORCH_BOX(&convmae::cuda_architectures));
}
