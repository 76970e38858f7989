// Sums of products of rows of channels, which the strided depthwise convolution and its gradients
// are made of. In an anonymous namespace for the reason given in vec.h.
#pragma once

#include "cpu/vec.h"
#include "strided_conv2d.h"

namespace convmae {
namespace {

// Calls f(vectors, lanes, channel) until every channel is covered: pieces of four vectors, whose
// sums do not wait for each other, then of fewer, then channel by channel.
template <class A, class F>
__attribute__((always_inline)) inline void for_pieces(int64_t channels, F&& f) {
  int64_t c = 0;
  const auto pieces = [&](auto vectors, auto lanes) __attribute__((always_inline)) {
    for (; c + vectors * lanes <= channels; c += vectors * lanes) f(vectors, lanes, c);
  };
  pieces(Index<4>{}, Index<kLanes<A>>{});
  pieces(Index<2>{}, Index<kLanes<A>>{});
  pieces(Index<1>{}, Index<kLanes<A>>{});
  pieces(Index<1>{}, Index<1>{});
}

// to = from + a[0] * b[0] + a[1] * b[1] + ..., all of them rows of channels, for the piece of them
// that begins at channel `c`. With FromZero, for sums that go on, the products are added up first:
// each addition to a long sum rounds anew.
template <bool FromZero, int Vectors, int N, class T, class U, class O>
inline void add_products(int64_t c, int64_t count, const T* const* a, const U* const* b,
                         const Acc<T>* from, O* to) {
  Vec<Acc<T>, N> sum[Vectors];
  unroll<Vectors>(
      [&](auto v) { sum[v] = FromZero ? Vec<Acc<T>, N>{} : load<N>(from + c + v * N); });
  for (int64_t i = 0; i < count; ++i) {
    const T* const x = a[i] + c;
    const U* const y = b[i] + c;
    unroll<Vectors>([&](auto v) { sum[v] += load<N>(x + v * N) * load<N>(y + v * N); });
  }
  unroll<Vectors>([&](auto v) {
    if constexpr (FromZero) sum[v] += load<N>(from + c + v * N);
    store<N>(to + c + v * N, sum[v]);
  });
}

// Calls f(tap, row of the source) for what is visible of what a position meets.
template <class T, class Params, class F>
inline void for_met(const Params& p, int64_t block, int64_t rank, F&& f) {
  const int32_t* const table = p.neighbours + block * p.table_columns;
  const T* const source = static_cast<const T*>(p.source);
  for (int32_t i = p.first[rank]; i < p.first[rank + 1]; ++i) {
    const cpu::Meeting& met = p.meetings[i];
    const int64_t from = table[met.place.neighbour];
    if (from >= 0) f(met.tap, source + (from * p.source_positions + met.place.rank) * p.channels);
  }
}

}  // namespace
}  // namespace convmae
