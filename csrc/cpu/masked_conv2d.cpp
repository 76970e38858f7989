// CPU kernel: depthwise convolution of the blocks [begin, end); compiled once for each instruction
// set, CONVMAE_ISA.
#include "masked_conv2d.h"

#include "cpu/strips.h"

namespace convmae {
namespace {

using cpu::MaskedConv2dForward;

// Adds what one segment of a row gives to a strip: x[Strip + K - 1], taps [K][channels], sums
// [Strip][channels]. With First, which is for a segment that meets every output, the sums begin
// with `bias`.
template <class T, int K, int Strip, int S, bool First>
inline void convolve_segment(int64_t channels, const T* const* x, const Acc<T>* taps,
                             const Acc<T>* bias, Acc<T>* sums) {
  using Seg = Segment<K, Strip, S>;
  const T* at[Strip + K - 1];
  unroll<Seg::kEnd, Seg::kBegin>([&](auto i) { at[i] = x[i]; });
  for_vectors<Acc<T>>(channels, [&](auto n, int64_t c) {
    Vec<Acc<T>, n> sum[Strip], value[Strip + K - 1];
    unroll<Seg::kLastOutput, Seg::kFirstOutput>(
        [&](auto o) { sum[o] = load<n>(First ? bias + c : sums + o * channels + c); });
    unroll<Seg::kEnd, Seg::kBegin>([&](auto i) { value[i] = load<n>(at[i] + c); });
    for_meetings<K, Strip, S>(
        [&](auto i, auto j, auto o) { sum[o] += value[i] * load<n>(taps + j * channels + c); });
    unroll<Seg::kLastOutput, Seg::kFirstOutput>(
        [&](auto o) { store<n>(sums + o * channels + c, sum[o]); });
  });
}

// K is the side of a square kernel of dilation 1, or 0 for any kernel (then Strip is 1).
template <class T, int K, int Strip>
void forward_blocks(const MaskedConv2dForward& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t positions = int64_t(p.side) * p.side, channels = p.channels;
  const A *const bias = static_cast<const A*>(p.weight), *const taps = bias + channels;
  Window<T> window(p);
  const Offsets offsets(p);
  Buffer<A> sums(Strip * channels);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t start = block * positions * channels;
    window.move_to(block);
    const T* const x = static_cast<const T*>(p.x) + start;
    T* const y = static_cast<T*>(p.y) + start;
    for (int64_t i = 0; i < positions; i += Strip) {
      prefetch(x + i * channels, Strip * channels);
      const T* const* from = window.from(i);
      if constexpr (K > 0) {
        constexpr int own = kSegments<K, Strip> / 2;  // the strip itself, which is visible
        convolve_segment<T, K, Strip, own, true>(channels, from + K / 2 * p.window_columns(),
                                                 taps + K / 2 * K * channels, bias, sums.get());
        for_visible<K, Strip>(p.window_columns(), from, [&](auto s, int row, auto at) {
          if (s == own && row == K / 2) return;
          convolve_segment<T, K, Strip, decltype(s)::value, false>(
              channels, at, taps + row * K * channels, bias, sums.get());
        });
      } else {
        std::memcpy(sums.get(), bias, channels * sizeof(A));
        for_visible_taps(p, from, [&](int64_t tap, const T* x) {
          multiply_add(channels, x, taps + tap * channels, sums.get());
        });
      }
      for (int o = 0; o < Strip; ++o) {
        const A* sum = sums.get() + o * channels;
        T* to = y + offsets[i + o];
        for_vectors<A>(channels, [&](auto n, int64_t c) { store<n>(to + c, load<n>(sum + c)); });
      }
    }
  }
}

}  // namespace

namespace cpu {
template <>
void masked_conv2d<Isa::CONVMAE_ISA>(const MaskedConv2dForward& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto type) {
    with_shape<decltype(type)>(p, [&](auto kernel, auto strip) {
      forward_blocks<decltype(type), decltype(kernel)::value, decltype(strip)::value>(p, begin,
                                                                                      end);
    });
  });
}
}  // namespace cpu
}  // namespace convmae
