// What kernels ask of the device beyond plain C++, each with a plain twin that any compiler takes:
// words of packed values, conversions, copies that do not wait. The only header with assembly.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_pipeline.h>
#endif

#include "cuda/tile_memory.h"
#include "numbers.h"

// What must be inlined so that the arrays it works on live in registers. Compilers for the CPU are
// free, and compile faster.
#if defined(__CUDACC__)
#define CONVMAE_INLINE __forceinline__
#define CONVMAE_INLINE_LAMBDA __attribute__((always_inline))
#else
#define CONVMAE_INLINE inline
#define CONVMAE_INLINE_LAMBDA
#endif

namespace convmae::cuda {

// A lane works on the channels of one word of 4 bytes, a warp on 128 bytes of channels.
template <class T>
constexpr int kWordChannels = 4 / int(sizeof(T));
template <class T>
constexpr int kWarpChannels = 32 * kWordChannels<T>;

// Eight bytes: in half types, four channels of a position.
struct alignas(8) Piece {
  uint32_t words[2];
};

__device__ inline bool is_finite(float x) { return x - x == 0; }

__device__ inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// The same value, which the compiler keeps in a register: it does not know where it comes from, so
// it cannot compute it again at every use. All lanes of the warp must call it.
__device__ inline uint32_t kept(uint32_t x) {
#if defined(__CUDA_ARCH__)
  return __shfl_xor_sync(0xffffffffu, x, 0);
#else
  return x;
#endif
}
template <class T>
__device__ inline T* kept(T* pointer) {
#if defined(__CUDA_ARCH__)
  return reinterpret_cast<T*>(__shfl_xor_sync(0xffffffffu, reinterpret_cast<uint64_t>(pointer), 0));
#else
  return pointer;
#endif
}

// An address in shared memory that the compiler keeps in a register.
template <class T>
__device__ inline T* kept_shared(T* pointer) {
#if defined(__CUDA_ARCH__)
  return static_cast<T*>(
      __cvta_shared_to_generic(kept(uint32_t(__cvta_generic_to_shared(pointer)))));
#else
  return pointer;
#endif
}

// pointer + count * bytes, both below 2^31, in one instruction.
template <class Byte>
__device__ inline Byte* advance(Byte* pointer, uint32_t count, uint32_t bytes) {
  static_assert(sizeof(Byte) == 1);
#if defined(__CUDA_ARCH__)
  uint64_t result;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(result) : "r"(count), "r"(bytes), "l"(pointer));
  return reinterpret_cast<Byte*>(result);
#else
  return pointer + uint64_t(count) * bytes;
#endif
}

// The upper half of the product.
__device__ inline uint64_t high_product(uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(a, b);
#else
  return uint64_t(static_cast<unsigned __int128>(a) * b >> 64);
#endif
}

// Reads and writes global memory: the compiler does not see that a pointer from `advance` leads
// there.
__device__ inline uint32_t load_word(const void* global) {
  uint32_t word;
#if defined(__CUDA_ARCH__)
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(word) : "l"(global) : "memory");
#else
  std::memcpy(&word, global, 4);
#endif
  return word;
}
__device__ inline void store_word(uint32_t word, void* global) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.u32 [%0], %1;" ::"l"(global), "r"(word) : "memory");
#else
  std::memcpy(global, &word, 4);
#endif
}

__device__ inline void store_chunk(const Chunk& chunk, void* global) {
#if defined(__CUDA_ARCH__)
  const uint4 words = *reinterpret_cast<const uint4*>(&chunk);
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(words.x), "r"(words.y),
               "r"(words.z), "r"(words.w)
               : "memory");
#else
  *static_cast<Chunk*>(global) = chunk;
#endif
}

// A byte of a word, the lowest one first.
__device__ inline uint32_t byte_of(uint32_t word, int byte) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(word, 0, 0x4440 + byte);
#else
  return word >> 8 * byte & 0xff;
#endif
}

// A value in the accumulation type, and back.
__device__ inline float load(const float* x) { return *x; }
__device__ inline double load(const double* x) { return *x; }
__device__ inline float load(const BFloat16* x) { return to_acc(*x); }
__device__ inline float load(const Half* x) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x->bits));
  return value;
#else
  return to_acc(*x);
#endif
}

__device__ inline void store(float x, float* out) { *out = x; }
__device__ inline void store(double x, double* out) { *out = x; }
__device__ inline void store(float x, BFloat16* out) { from_acc(x, out); }
__device__ inline void store(float x, Half* out) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->bits) : "f"(x));
#else
  from_acc(x, out);
#endif
}

// The channels of a word, the first one in the low bits.
__device__ inline void unpack(float, uint32_t word, float (&x)[1]) { x[0] = as_float(word); }
__device__ inline void unpack(BFloat16, uint32_t word, float (&x)[2]) {
  x[0] = as_float(word << 16);
  x[1] = as_float(word & 0xffff0000u);
}
__device__ inline void unpack(Half, uint32_t word, float (&x)[2]) {
  const Half low{uint16_t(word)}, high{uint16_t(word >> 16)};
  x[0] = load(&low);
  x[1] = load(&high);
}

__device__ inline uint32_t pack(float, const float (&x)[1]) {
  uint32_t word;
  std::memcpy(&word, x, 4);
  return word;
}
__device__ inline uint32_t pack(BFloat16, const float (&x)[2]) {
#if defined(__CUDA_ARCH__)
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(x[1]), "f"(x[0]));
  return word;
#else
  BFloat16 low, high;
  from_acc(x[0], &low);
  from_acc(x[1], &high);
  return low.bits | uint32_t(high.bits) << 16;
#endif
}
__device__ inline uint32_t pack(Half, const float (&x)[2]) {
#if defined(__CUDA_ARCH__)
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(x[1]), "f"(x[0]));
  return word;
#else
  Half low, high;
  from_acc(x[0], &low);
  from_acc(x[1], &high);
  return low.bits | uint32_t(high.bits) << 16;
#endif
}

// Copies 16 bytes, or 4, from global to shared memory without waiting; `copies_wait` waits for all
// copies of the thread.
__device__ inline void copy_chunk(void* shared, const void* global) {
  __pipeline_memcpy_async(shared, global, 16);
}
__device__ inline void copy_word(void* shared, const void* global) {
  __pipeline_memcpy_async(shared, global, 4);
}
__device__ inline void copies_wait() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
}
// Copies that began since the last call are one group; waits for all groups but the last one.
__device__ inline void copies_commit() { __pipeline_commit(); }
__device__ inline void copies_wait_but_one() { __pipeline_wait_prior(1); }

}  // namespace convmae::cuda
