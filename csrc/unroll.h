// Loops whose index is a constant of the compiler. No torch.
#pragma once

#include <utility>

#include "block.h"

namespace convmae {

template <int I>
struct Index {
  static constexpr int value = I;
  CONVMAE_HD constexpr operator int() const { return I; }
};

template <class F, int... I>
CONVMAE_HD __attribute__((always_inline)) static inline void call_with_each(
    F&& f, std::integer_sequence<int, I...>) {
  (f(Index<I>{}), ...);
}

// f(Index<0>), ..., f(Index<N - 1>), unrolled, so that what they index can live in registers.
template <int N, class F>
CONVMAE_HD __attribute__((always_inline)) static inline void unroll(F&& f) {
  call_with_each(f, std::make_integer_sequence<int, N>{});
}

}  // namespace convmae
