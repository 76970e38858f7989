// The instruction set of this machine, and the kernel that was compiled for it. No torch.
#pragma once

#include <type_traits>

namespace convmae {

// A source that mentions CONVMAE_ISA is compiled once for each of them, with its name as
// CONVMAE_ISA and with the flags that setup.py has for it; on machines other than x86-64 for
// Baseline only.
enum class Isa { Baseline, Avx2, Avx512 };

constexpr int vector_bytes(Isa isa) { return isa == Isa::Avx512 ? 64 : isa == Isa::Avx2 ? 32 : 16; }

// The widest instruction set that this machine has; ATEN_CPU_CAPABILITY, which torch obeys too, can
// ask for less ("default" or "avx2").
Isa cpu_isa();

// f(std::integral_constant<Isa, isa>), with the widest instruction set that this machine has.
template <class F>
auto with_isa(F&& f) {
#if defined(__x86_64__)
  switch (cpu_isa()) {
    case Isa::Avx512: return f(std::integral_constant<Isa, Isa::Avx512>{});
    case Isa::Avx2: return f(std::integral_constant<Isa, Isa::Avx2>{});
    case Isa::Baseline: break;
  }
#endif
  return f(std::integral_constant<Isa, Isa::Baseline>{});
}

}  // namespace convmae
