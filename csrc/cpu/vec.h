// Vectors of the accumulation type, as wide as the instruction set this file is compiled for.
// Everything is in an anonymous namespace: the kernels are compiled once for each instruction set,
// and a function shared by the linker between them would run on the wrong machine.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "numbers.h"
#include "unroll.h"

namespace convmae {
namespace {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

template <class E, int Bytes>
struct VecOf {
  typedef E type __attribute__((vector_size(Bytes)));
};

// N lanes of the accumulation type; one lane is the plain type, for what is left of a row.
template <class A, int N>
struct Lanes {
  using type = typename VecOf<A, N* int(sizeof(A))>::type;
};
template <class A>
struct Lanes<A, 1> {
  using type = A;
};
template <class A, int N>
using Vec = typename Lanes<A, N>::type;

template <class A>
constexpr int kLanes = kVecBytes / int(sizeof(A));

// -- a vector ---------------------------------------------------------------------------------

template <int N, class T>
inline Vec<Acc<T>, N> load(const T* p) {
  Vec<Acc<T>, N> x;
  if constexpr (N == 1) {
    x = to_acc(*p);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    typename VecOf<uint16_t, 2 * N>::type narrow;
    std::memcpy(&narrow, p, sizeof(narrow));
    const auto bits = __builtin_convertvector(narrow, typename VecOf<uint32_t, 4 * N>::type) << 16;
    std::memcpy(&x, &bits, sizeof(x));
  } else if constexpr (std::is_same_v<T, Half>) {
#if defined(__AVX512F__)
    const __m512 wide = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    std::memcpy(&x, &wide, sizeof(x));
#elif defined(__F16C__)
    const __m256 wide = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    std::memcpy(&x, &wide, sizeof(x));
#else
    for (int i = 0; i < N; ++i) x[i] = to_acc(p[i]);
#endif
  } else {
    std::memcpy(&x, p, sizeof(x));
  }
  return x;
}

template <int N, class T>
inline void store(T* p, Vec<Acc<T>, N> x) {
  if constexpr (N == 1) {
    from_acc(x, p);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    using Bits = typename VecOf<uint32_t, 4 * N>::type;
    Bits bits;
    std::memcpy(&bits, &x, sizeof(x));
    const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Bits chosen = x == x ? rounded : Bits{} + 0x7fc0;
    const auto narrow = __builtin_convertvector(chosen, typename VecOf<uint16_t, 2 * N>::type);
    std::memcpy(p, &narrow, sizeof(narrow));
  } else if constexpr (std::is_same_v<T, Half>) {
#if defined(__AVX512F__)
    __m512 wide;
    std::memcpy(&wide, &x, sizeof(x));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    __m256 wide;
    std::memcpy(&wide, &x, sizeof(x));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < N; ++i) from_acc(x[i], p + i);
#endif
  } else {
    std::memcpy(p, &x, sizeof(x));
  }
}

// -- loops ------------------------------------------------------------------------------------

// Calls f(lanes, channel) until every channel is covered: whole vectors, then one by one.
template <class A, class F>
__attribute__((always_inline)) inline void for_vectors(int64_t channels, F&& f) {
  int64_t c = 0;
  for (; c + kLanes<A> <= channels; c += kLanes<A>) f(Index<kLanes<A>>{}, c);
  for (; c < channels; ++c) f(Index<1>{}, c);
}

// -- memory ------------------------------------------------------------------------------------

// Zeros at first.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<T*>(std::calloc(size > 0 ? size : 1, sizeof(T)))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

}  // namespace
}  // namespace convmae
