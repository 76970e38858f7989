// CPU kernel: the depthwise convolution's gradients in weight and bias, and in x where they are
// wanted, in one walk over x and the output's gradient; compiled once for each instruction set,
// CONVMAE_ISA.
#include "cpu/any_kernel.h"
#include "cpu/tiles.h"
#include "masked_conv2d.h"

namespace convmae {
namespace {

using cpu::MaskedConv2dGrads;

// The gradient of the convolution in x is one of `grad` with the flipped weight. A tile of x is
// looked at from there too, so that both gradients need the same surroundings.
template <class T, int K, int S>
void tile_grads(const MaskedConv2dGrads& p, int64_t first_part, int64_t last_part) {
  using A = Acc<T>;
  constexpr int lanes = kLanes<A>, row = (1 + K * K) * lanes;
  const int64_t channels = p.channels;
  const Vectors vectors(channels, lanes);
  const bool wants_x = p.grad_x != nullptr;
  const TapTable<T> table(p.weight, wants_x ? channels : 0, K * K, true);
  Buffer<A> sums(vectors.count() * row);  // [vectors][1 + taps][lanes]
  for (int64_t part = first_part; part < last_part; ++part) {
    std::memset(sums.get(), 0, vectors.count() * row * sizeof(A));
    const auto of_tile = [&](int64_t vector, int64_t at, const T* const* seen) {
      const int64_t c = vectors.first_channel(vector);
      if (wants_x) {
        convolve_tile<T, K, S>(seen, c, channels, Vec<A, lanes>{}, table[vector],
                               static_cast<T*>(p.grad_x) + at + c);
      }
      A* const sum = sums.get() + vector * row;
      correlate_tile<T, K, S>(static_cast<const T*>(p.x) + at + c, seen, c, channels, sum + lanes);
      const auto bias = sum_tile<T, S>(static_cast<const T*>(p.grad) + at + c, channels);
      store<lanes>(sum, load<lanes>(sum) + bias);
    };
    for_tiles<T, K, S>(p, p.grad, p.first_block(part), p.first_block(part + 1),
                       {p.grad, p.x, p.grad_x}, of_tile);
    A* const to = static_cast<A*>(p.partial) + part * (1 + K * K) * channels;
    for (int64_t v = 0; v < vectors.count(); ++v) {
      for (int64_t i = 0; i < 1 + K * K; ++i) {
        store<lanes>(to + i * channels + vectors.first_channel(v),
                     load<lanes>(sums.get() + v * row + i * lanes));
      }
    }
  }
}

template <class T>
void position_grads(const MaskedConv2dGrads& p, int64_t first_part, int64_t last_part) {
  using A = Acc<T>;
  const int64_t channels = p.channels, taps = p.kernel_rows * int64_t(p.kernel_columns);
  const bool wants_x = p.grad_x != nullptr;
  Buffer<A> weight(wants_x ? taps * channels : 0), sums(channels);
  if (wants_x) fill_tap_rows<T>(p.weight, channels, taps, true, weight.get());
  Window<T> window(p, p.grad);
  for (int64_t part = first_part; part < last_part; ++part) {
    A* const bias = static_cast<A*>(p.partial) + part * (1 + taps) * channels;
    std::memset(bias, 0, (1 + taps) * channels * sizeof(A));
    for (int64_t block = p.first_block(part); block < p.first_block(part + 1); ++block) {
      window.move_to(block);
      for (int rank = 0; rank < p.side * p.side; ++rank) {
        const int64_t at = (block * p.side * p.side + rank) * channels;
        const T *const x = static_cast<const T*>(p.x) + at, *const own =
                                                                static_cast<const T*>(p.grad) + at;
        for_vectors<A>(channels, [&](auto n, int64_t c) {
          store<n>(bias + c, load<n>(bias + c) + load<n>(own + c));
        });
        std::memset(sums.get(), 0, channels * sizeof(A));
        const auto visit = [&](int64_t tap, const T* grad) {
          // x[q] meets grad[q - d] with the tap d, which the window has at its mirror image.
          multiply_add(channels, x, grad, bias + (taps - tap) * channels);
          if (wants_x) multiply_add(channels, grad, weight.get() + tap * channels, sums.get());
        };
        window.for_visible_taps(zorder_row(rank), zorder_column(rank), visit);
        if (wants_x) store_row(channels, sums.get(), static_cast<T*>(p.grad_x) + at);
      }
    }
  }
}

}  // namespace

namespace cpu {
template <>
void masked_conv2d_grads<Isa::CONVMAE_ISA>(const MaskedConv2dGrads& p, int64_t first_part,
                                           int64_t last_part) {
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    const bool done = with_tiles<T>(p, [&](auto kernel, auto side) {
      tile_grads<T, decltype(kernel)::value, decltype(side)::value>(p, first_part, last_part);
    });
    if (!done) position_grads<T>(p, first_part, last_part);
  });
}
}  // namespace cpu
}  // namespace convmae
