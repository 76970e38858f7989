// CPU kernel: the share of the blocks [begin, end) of the depthwise convolution's gradients in
// weight and bias; compiled once for each instruction set, CONVMAE_ISA.
#include "cpu/strips.h"
#include "masked_conv2d.h"

namespace convmae {
namespace {

using cpu::MaskedConv2dWeightGrad;

// Adds what one segment of a row gives to the gradients of a kernel row: x[Strip + K - 1],
// grad[Strip], sums [K][channels].
template <class T, int K, int Strip, int S>
inline void correlate_segment(int64_t channels, const T* const* x, const T* const* grad,
                              Acc<T>* sums) {
  using Seg = Segment<K, Strip, S>;
  const T *at[Strip + K - 1], *g[Strip];
  unroll<Seg::kEnd, Seg::kBegin>([&](auto i) { at[i] = x[i]; });
  unroll<Seg::kLastOutput, Seg::kFirstOutput>([&](auto o) { g[o] = grad[o]; });
  for_vectors<Acc<T>>(channels, [&](auto n, int64_t c) {
    Vec<Acc<T>, n> sum[K], weight[Strip], value[Strip + K - 1];
    // From zero, as each addition to a long sum rounds anew.
    unroll<Seg::kLastTap, Seg::kFirstTap>([&](auto j) { sum[j] = Vec<Acc<T>, n>{}; });
    unroll<Seg::kLastOutput, Seg::kFirstOutput>([&](auto o) { weight[o] = load<n>(g[o] + c); });
    unroll<Seg::kEnd, Seg::kBegin>([&](auto i) { value[i] = load<n>(at[i] + c); });
    for_meetings<K, Strip, S>([&](auto i, auto j, auto o) { sum[j] += value[i] * weight[o]; });
    unroll<Seg::kLastTap, Seg::kFirstTap>([&](auto j) {
      store<n>(sums + j * channels + c, load<n>(sums + j * channels + c) + sum[j]);
    });
  });
}

// `partial` is [1 + taps][channels]: the bias, the taps.
template <class T, int K, int Strip>
void weight_grad_blocks(const MaskedConv2dWeightGrad& p, void* partial, int64_t begin,
                        int64_t end) {
  using A = Acc<T>;
  const int64_t positions = int64_t(p.side) * p.side, channels = p.channels;
  A *const bias = static_cast<A*>(partial), *const taps = bias + channels;
  std::memset(bias, 0, (1 + int64_t(p.kernel_rows) * p.kernel_columns) * channels * sizeof(A));
  Window<T> window(p);
  const Offsets offsets(p);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t start = block * positions * channels;
    window.move_to(block);
    const T* const x = static_cast<const T*>(p.x) + start;
    const T* const first = static_cast<const T*>(p.grad) + start;
    for (int64_t i = 0; i < positions; i += Strip) {
      prefetch(x + i * channels, Strip * channels);
      prefetch(first + i * channels, Strip * channels);
      const T* grad[Strip];
      unroll<Strip>([&](auto o) { grad[o] = first + offsets[i + o]; });
      for_vectors<A>(channels, [&](auto n, int64_t c) {
        auto sum = load<n>(bias + c);
        unroll<Strip>([&](auto o) { sum += load<n>(grad[o] + c); });
        store<n>(bias + c, sum);
      });
      if constexpr (K > 0) {
        for_visible<K, Strip>(p.window_columns(), window.from(i), [&](auto s, int row, auto x) {
          correlate_segment<T, K, Strip, decltype(s)::value>(channels, x, grad,
                                                             taps + row * K * channels);
        });
      } else {
        for_visible_taps(p, window.from(i), [&](int64_t tap, const T* x) {
          multiply_add(channels, x, grad[0], taps + tap * channels);
        });
      }
    }
  }
}

}  // namespace

namespace cpu {
template <>
void masked_conv2d_weight_grad<Isa::CONVMAE_ISA>(const MaskedConv2dWeightGrad& p, void* partial,
                                                 int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto type) {
    with_shape<decltype(type)>(p, [&](auto kernel, auto strip) {
      weight_grad_blocks<decltype(type), decltype(kernel)::value, decltype(strip)::value>(
          p, partial, begin, end);
    });
  });
}
}  // namespace cpu
}  // namespace convmae
