// Loops whose index is a constant of the compiler. No torch.
#pragma once

#include "block.h"

namespace convmae {

template <int I>
struct Index {
  static constexpr int value = I;
  CONVMAE_HD constexpr operator int() const { return I; }
};

// f(Index<0>), ..., f(Index<N - 1>), unrolled, so that what they index can live in registers.
template <int N, int I = 0, class F>
CONVMAE_HD __attribute__((always_inline)) static inline void unroll(F&& f) {
  if constexpr (I < N) {
    f(Index<I>{});
    unroll<N, I + 1>(f);
  }
}

}  // namespace convmae
