// What kernels ask of tensor cores: the product of a matrix in which every other element of a row
// is zero. On compute capability 8.0 and later.
#pragma once

#include <cstdint>

#include "cuda/vec.cuh"

namespace convmae::cuda {

// What a lane holds of two factors, in words of two half values, as the instruction mma.sp m16n8k32
// wants it. With group = lane / 4 and quad = lane % 4:
//   a: [16, 16], rows group, group + 8, group, group + 8; columns 2 * quad and the next one, from 0
//      for the first two words and from 8 for the others.
//   b: [16 * 2, 8], column group; word i has both elements of row 4 * i + quad.
struct Fragment {
  uint32_t a[4], b[4];
};

#if !defined(__CUDACC__)
template <class T>
inline float element(uint32_t word, int i) {
  float values[2];
  unpack(T{}, word, values);
  return values[i];
}
#endif

// sum += a * b with the rows 2 * k + Element of b only: of every pair, its first element or its
// second. Products are exact, sums float32. `sum` is [16, 8]: rows group and group + 8, of each the
// columns 2 * quad and 2 * quad + 1. All lanes of the warp must call it.
template <class T, int Element>
__device__ inline void multiply_pairs(float (&sum)[4], const uint32_t (&a)[4],
                                      const uint32_t (&b)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  // Which two of four elements count, 2 bits for each of the two: 0 and 2, or 1 and 3.
  constexpr uint32_t kChosen = Element == 0 ? 0x88888888u : 0xddddddddu;
#define CONVMAE_MMA(type)                                                                     \
  asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." type "." type             \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0;" \
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]),          \
        "r"(b[3]), "r"(kChosen))
  if constexpr (std::is_same_v<T, BFloat16>) {
    CONVMAE_MMA("bf16");
  } else {
    CONVMAE_MMA("f16");
  }
#undef CONVMAE_MMA
#elif !defined(__CUDACC__)
  Fragment own;
  std::memcpy(own.a, a, sizeof(a));
  std::memcpy(own.b, b, sizeof(b));
  Fragment all[32];
  simt::exchange(&own, sizeof(own), all);
  const int group = simt::lane() / 4, quad = simt::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = i / 2, column = 2 * quad + i % 2;  // row: group + 8 * row
    for (int k = 0; k < 16; ++k) {
      const uint32_t left = all[4 * group + k % 8 / 2].a[row + k / 8 * 2];
      const uint32_t right = all[4 * column + k % 4].b[k / 4];
      sum[i] += element<T>(left, k % 2) * element<T>(right, Element);
    }
  }
#endif
}

// Asks for the line of memory at this address to be brought to the L2 cache.
__device__ inline void prefetch(const void* global) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
#else
  (void)global;
#endif
}

}  // namespace convmae::cuda
