// CPU kernel: depthwise convolution of the blocks [begin, end); compiled once for each instruction
// set, CONVMAE_ISA.
#include "masked_conv2d.h"

#include "cpu/any_kernel.h"
#include "cpu/tiles.h"

namespace convmae {
namespace {

using cpu::MaskedConv2dForward;

template <class T, int K, int S>
void convolve_tiles(const MaskedConv2dForward& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t channels = p.channels;
  const Vectors vectors(channels, kLanes<A>);
  const TapTable<T> table(p.weight, channels, K * K, false);
  Buffer<A> bias(channels);
  if (p.bias != nullptr) fill_tap_rows<T>(p.bias, channels, 1, false, bias.get());
  for_tiles<T, K, S>(p, p.x, begin, end, {p.x, p.y},
                     [&](int64_t vector, int64_t at, const T* const* seen) {
                       const int64_t c = vectors.first_channel(vector);
                       convolve_tile<T, K, S>(seen, c, channels, load<kLanes<A>>(bias.get() + c),
                                              table[vector], static_cast<T*>(p.y) + at + c);
                     });
}

template <class T>
void convolve_positions(const MaskedConv2dForward& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t channels = p.channels, taps = p.kernel_rows * int64_t(p.kernel_columns);
  Buffer<A> bias(channels), weight(taps * channels), sums(channels);
  if (p.bias != nullptr) fill_tap_rows<T>(p.bias, channels, 1, false, bias.get());
  fill_tap_rows<T>(p.weight, channels, taps, false, weight.get());
  Window<T> window(p, p.x);
  for (int64_t block = begin; block < end; ++block) {
    window.move_to(block);
    T* y = static_cast<T*>(p.y) + block * p.side * p.side * channels;
    for (int rank = 0; rank < p.side * p.side; ++rank, y += channels) {
      std::memcpy(sums.get(), bias.get(), channels * sizeof(A));
      window.for_visible_taps(zorder_row(rank), zorder_column(rank), [&](int64_t tap, const T* x) {
        multiply_add(channels, x, weight.get() + tap * channels, sums.get());
      });
      store_row(channels, sums.get(), y);
    }
  }
}

}  // namespace

namespace cpu {
template <>
void masked_conv2d<Isa::CONVMAE_ISA>(const MaskedConv2dForward& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    const bool done = with_tiles<T>(p, [&](auto kernel, auto side) {
      convolve_tiles<T, decltype(kernel)::value, decltype(side)::value>(p, begin, end);
    });
    if (!done) convolve_positions<T>(p, begin, end);
  });
}
}  // namespace cpu
}  // namespace convmae
