// The number types of features: what they accumulate in, and how they round. No torch; for the
// kernels of every instruction set and device, so nothing here is shared by the linker.
#pragma once

#include <cstdint>
#include <cstring>

#include "block.h"

namespace convmae {

enum class DType : int { Float, BFloat16, Half, Double };

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

// f of a value of the type.
template <class F>
void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::Float: return f(float{});
    case DType::BFloat16: return f(BFloat16{});
    case DType::Half: return f(Half{});
    case DType::Double: return f(double{});
  }
}

constexpr int size_of(DType dtype) {
  return dtype == DType::Double ? 8 : dtype == DType::Float ? 4 : 2;
}

CONVMAE_HD static inline float to_acc(float x) { return x; }
CONVMAE_HD static inline double to_acc(double x) { return x; }
CONVMAE_HD static inline float to_acc(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
CONVMAE_HD static inline float to_acc(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  uint32_t bits;
  if (magnitude >= 0x7c00) {  // infinity, NaN
    bits = sign | 0x7f800000u | (magnitude & 0x3ff) << 13;
  } else if (magnitude >= 0x400) {
    bits = sign | ((magnitude << 13) + (112u << 23));
  } else {  // subnormal: a multiple of 2^-24
    const float value = float(magnitude) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &value, 4);
    bits |= sign;
  }
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

CONVMAE_HD static inline void from_acc(float x, float* out) { *out = x; }
CONVMAE_HD static inline void from_acc(double x, double* out) { *out = x; }
CONVMAE_HD static inline void from_acc(float x, BFloat16* out) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  out->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
CONVMAE_HD static inline void from_acc(float x, Half* out) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  uint32_t half;
  if (bits > 0x7f800000) {
    half = 0x7e00;
  } else if (bits >= 0x47800000) {  // 2^16 and more
    half = 0x7c00;
  } else if (bits >= 0x38800000) {  // normal; a carry into the exponent is right, up to infinity
    half = (bits - (112u << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
  } else {  // subnormal: the float adder rounds to a multiple of 2^-24
    float value;
    std::memcpy(&value, &bits, 4);
    value += 0.5f;
    std::memcpy(&half, &value, 4);
    half -= 0x3f000000;
  }
  out->bits = uint16_t(sign | half);
}

}  // namespace convmae
