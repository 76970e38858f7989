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

// Which two of four consecutive elements of a row count, for all rows alike: of each of two pairs
// the first one, or the second.
constexpr uint32_t kFirstOfPairs = 0x88888888u, kSecondOfPairs = 0xddddddddu;

// sum += a * b', where b' has of every row of pairs in b the elements that are chosen. Products are
// exact, sums float32. `sum` is [16, 8]: rows group and group + 8, of each the columns 2 * quad and
// 2 * quad + 1. All lanes of the warp must call it.
template <class T>
__device__ inline void multiply_pairs(float (&sum)[4], const uint32_t (&a)[4],
                                      const uint32_t (&b)[4], uint32_t chosen) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define CONVMAE_MMA(type)                                                                        \
  asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." type "." type       \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, " \
               "%12, 0;"                                                                         \
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]),    \
                 "r"(b[3]), "r"(chosen))
  if constexpr (std::is_same_v<T, BFloat16>) {
    CONVMAE_MMA("bf16");
  } else {
    CONVMAE_MMA("f16");
  }
#undef CONVMAE_MMA
#elif !defined(__CUDACC__)
  Fragment own, all[32];
  std::memcpy(own.a, a, sizeof(a));
  std::memcpy(own.b, b, sizeof(b));
  simt::exchange(&own, sizeof(own), all);
  const int group = simt::lane() / 4, quad = simt::lane() % 4;
  float rows[2][16], columns[2][16];  // those that the lane's sums need
  for (int i = 0; i < 2; ++i) {
    for (int k = 0; k < 16; ++k) {
      float pair[2];
      unpack(T{}, all[4 * group + k % 8 / 2].a[i + k / 8 * 2], pair);
      rows[i][k] = pair[k % 2];
      unpack(T{}, all[4 * (2 * quad + i) + k % 4].b[k / 4], pair);
      columns[i][k] = pair[chosen & 1];
    }
  }
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 16; ++k) sum[i] += rows[i / 2][k] * columns[i % 2][k];
  }
#endif
}

// An address in shared memory that stays in one register; offsets are constants, in bytes. All
// lanes of the warp must make it.
class SharedAddress {
 public:
  __device__ explicit SharedAddress(void* shared)
#if defined(__CUDA_ARCH__)
      : address_(kept(uint32_t(__cvta_generic_to_shared(shared)))){}
#else
      : address_(static_cast<char*>(shared)) {
  }
#endif

        template <int Offset>
        __device__ Chunk load() const {
    Chunk chunk;
#if defined(__CUDA_ARCH__)
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4 + %5];"
                 : "=r"(chunk.words[0]), "=r"(chunk.words[1]), "=r"(chunk.words[2]),
                   "=r"(chunk.words[3])
                 : "r"(address_), "n"(Offset)
                 : "memory");
#else
    chunk = *reinterpret_cast<const Chunk*>(address_ + Offset);
#endif
    return chunk;
  }

  template <int Offset>
  __device__ void store(Piece piece) const {
#if defined(__CUDA_ARCH__)
    asm volatile("st.shared.v2.u32 [%0 + %1], {%2, %3};" ::"r"(address_), "n"(Offset),
                 "r"(piece.words[0]), "r"(piece.words[1])
                 : "memory");
#else
    *reinterpret_cast<Piece*>(address_ + Offset) = piece;
#endif
  }

  template <int Offset>
  __device__ void clear() const {
#if defined(__CUDA_ARCH__)
    asm volatile("st.shared.v4.u32 [%0 + %1], {%2, %2, %2, %2};" ::"r"(address_), "n"(Offset),
                 "r"(0)
                 : "memory");
#else
    *reinterpret_cast<Chunk*>(address_ + Offset) = {};
#endif
  }

  // Starts the copies of two words, Apart bytes apart here and GlobalApart in global memory; if
  // `wanted` is 0, of zeros, and nothing is read. No branch: lanes stay together.
  template <int Offset, int Apart, int GlobalApart>
  __device__ void copy_two_words(const char* global, uint32_t wanted) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile(
        "{\n.reg .pred ignored;\nsetp.eq.u32 ignored, %4, 0;\n"
        "cp.async.ca.shared.global [%0 + %1], [%3], 4, ignored;\n"
        "cp.async.ca.shared.global [%0 + %2], [%3 + %5], 4, ignored;\n}" ::"r"(address_),
        "n"(Offset), "n"(Offset + Apart), "l"(global), "r"(wanted), "n"(GlobalApart)
        : "memory");
#elif !defined(__CUDACC__)
    static const uint32_t zero = 0;
    copy_word(address_ + Offset, wanted != 0 ? static_cast<const void*>(global) : &zero);
    copy_word(address_ + Offset + Apart,
              wanted != 0 ? static_cast<const void*>(global + GlobalApart) : &zero);
#endif
  }

 private:
#if defined(__CUDA_ARCH__)
  uint32_t address_;
#else
  char* address_;
#endif
};

// Asks for the line of memory at this address to be brought to the L2 cache.
__device__ inline void prefetch(const void* global) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
#else
  (void)global;
#endif
}

}  // namespace convmae::cuda
