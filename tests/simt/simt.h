// CUDA's language for g++: what csrc/cuda/*.cuh uses of it, on the fibers of scheduler.h.
//
// Shared memory is the one thing that macros cannot express: emulator.py rewrites its declarations
// to SIMT_SHARED and SIMT_DYNAMIC_SHARED.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "scheduler.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#ifndef __restrict__
#define __restrict__ __restrict
#endif

// `__shared__ T name[...]` and `extern __shared__ T name[]`.
#define SIMT_SHARED(name, ...)                                     \
  auto& name = *reinterpret_cast<std::add_pointer_t<__VA_ARGS__>>( \
      simt::shared(__COUNTER__, sizeof(__VA_ARGS__)))
#define SIMT_DYNAMIC_SHARED(type, name) \
  type* const name = reinterpret_cast<type*>(simt::dynamic_shared())

// -- vectors --------------------------------------------------------------------------------------

#define SIMT_VECTORS(type, name, pair_align, four_align)           \
  struct alignas(pair_align) name##2 { type x, y; };               \
  struct alignas(four_align) name##4 { type x, y, z, w; };         \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }

SIMT_VECTORS(int, int, 8, 16)
SIMT_VECTORS(unsigned, uint, 8, 16)
SIMT_VECTORS(float, float, 8, 16)
SIMT_VECTORS(short, short, 4, 8)
SIMT_VECTORS(unsigned short, ushort, 4, 8)
SIMT_VECTORS(unsigned char, uchar, 2, 4)

struct alignas(16) double2 {
  double x, y;
};
inline double2 make_double2(double x, double y) { return {x, y}; }

// -- barriers -------------------------------------------------------------------------------------

namespace simt {

inline uint64_t barrier(const char* name, int line, uint64_t bits = 0) {
  return wait({name, line, kBlock, bits, kAll, true});
}

inline int lane() {
  return int(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % warpSize;
}

// The value of the lane `source` of the caller's group of `width` lanes; the caller's own where
// that lies outside.
template <class T>
T shuffle(const char* name, int line, unsigned mask, T value, int source, int width) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const int first = lane() / width * width;
  if (source < first || source >= first + width) source = lane();
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = wait({name, line, mask, bits, source, false});
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace simt

#define SIMT_LINE int line = __builtin_LINE()

inline void __syncthreads(SIMT_LINE) { simt::barrier("__syncthreads", line); }
inline int __syncthreads_count(int predicate, SIMT_LINE) {
  return int(simt::barrier("__syncthreads_count", line, predicate != 0));
}
inline int __syncthreads_or(int predicate, SIMT_LINE) {
  return simt::barrier("__syncthreads_or", line, predicate != 0) != 0;
}
inline int __syncthreads_and(int predicate, SIMT_LINE) {
  return simt::barrier("__syncthreads_and", line, predicate == 0) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_LINE) {
  simt::wait({"__syncwarp", line, mask, 0, simt::kAll, true});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_LINE) {
  const uint64_t bits = uint64_t(predicate != 0) << simt::lane();
  return unsigned(simt::wait({"__ballot_sync", line, mask, bits, simt::kAll, false}));
}
inline int __any_sync(unsigned mask, int predicate, SIMT_LINE) {
  return __ballot_sync(mask, predicate, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SIMT_LINE) {
  return __ballot_sync(mask, !predicate, line) == 0;
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, SIMT_LINE) {
  const int first = simt::lane() / width * width;
  return simt::shuffle("__shfl_sync", line, mask, value, first + (source & (width - 1)), width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, SIMT_LINE) {
  return simt::shuffle("__shfl_up_sync", line, mask, value, simt::lane() - int(delta), width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, SIMT_LINE) {
  return simt::shuffle("__shfl_down_sync", line, mask, value, simt::lane() + int(delta), width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize, SIMT_LINE) {
  return simt::shuffle("__shfl_xor_sync", line, mask, value, simt::lane() ^ lanes, width);
}

// -- asynchronous copies, as in cuda_pipeline.h ---------------------------------------------------

inline void __pipeline_memcpy_async(void* shared, const void* global, size_t bytes) {
  simt::copy_later(shared, global, bytes);
}
inline void __pipeline_commit() { simt::commit_copies(); }
inline void __pipeline_wait_prior(int pending) { simt::wait_copies(pending); }

// -- functions ------------------------------------------------------------------------------------

using std::max;
using std::min;

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}
template <class T>
void __stcg(T* p, T value) {
  *p = value;
}
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// -- launching ------------------------------------------------------------------------------------

namespace simt {

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            unsigned seed, const Arguments&... arguments) {
  run_grid(grid, block, shared_bytes, kSharedBytes, seed, [&] { kernel(arguments...); });
}

// Stands where a launcher on a stream does; like that it asks for all shared memory.
struct Launcher {
  unsigned seed;

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                  const Arguments&... arguments) const {
    run_grid(grid, block, shared_bytes, kMostSharedBytes, seed, [&] { kernel(arguments...); });
  }
};

}  // namespace simt
