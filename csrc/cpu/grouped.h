// What the grouped convolution and its weight gradient share. In an anonymous namespace for the
// reason given in vec.h.
#pragma once

#include "cpu/vec.h"
#include "grouped_conv2d.h"

namespace convmae {
namespace {

// Rows of channels of a map, all of which can be read one vector beyond their end: the last rows
// are copied to where there is room for that.
template <class A>
class Rows {
 public:
  Rows(const void* map, int64_t rows, int64_t channels)
      : map_(static_cast<const A*>(map)),
        channels_(channels),
        copied_from_(rows > kLanes<A> / channels ? rows - kLanes<A> / channels - 1 : 0),
        copies_((rows - copied_from_ + 1) * channels + kLanes<A>),
        zeros_(channels + kLanes<A>) {
    std::memcpy(copies_.get(), map_ + copied_from_ * channels,
                (rows - copied_from_) * channels * sizeof(A));
  }
  const A* operator[](int64_t row) const {
    return row < copied_from_ ? map_ + row * channels_
                              : copies_.get() + (row - copied_from_) * channels_;
  }
  const A* zeros() const { return zeros_.get(); }

 private:
  const A* map_;
  const int64_t channels_, copied_from_;
  const Buffer<A> copies_, zeros_;
};

// Calls f(index, block, rank) for the positions of a chunk, those that see the same taps together;
// `index` counts them. Returns how many there are.
template <class F>
inline int64_t for_positions(const cpu::GroupedConv2dParams& p, int64_t chunk, F&& f) {
  const int64_t first = chunk * p.chunk_blocks;
  const int64_t after = first + p.chunk_blocks, last = after < p.blocks ? after : p.blocks;
  int64_t index = 0;
  for (int64_t of_class = 0; of_class < p.classes; ++of_class) {
    for (int64_t block = first; block < last; ++block) {
      for (int64_t rank = of_class; rank < p.positions; rank += p.classes) f(index++, block, rank);
    }
  }
  return index;
}

// The row of the source that a position sees with a tap; -1 for none.
inline int64_t source_row(const cpu::GroupedConv2dParams& p, int64_t block, int64_t rank,
                          int64_t tap) {
  const Place place = p.places[rank * p.layout.taps + tap];
  if (place.neighbour < 0) return -1;
  const int64_t seen = p.neighbours[block * p.table_columns + place.neighbour];
  return seen < 0 ? -1 : seen * p.source_positions + place.rank;
}

// -- vectors ----------------------------------------------------------------------------------

template <class A>
using Full = Vec<A, kLanes<A>>;
template <class A>
using LaneIndex =
    typename VecOf<std::conditional_t<sizeof(A) == 8, int64_t, int32_t>, kVecBytes>::type;

template <class A>
inline Full<A> all_lanes(A x) {
  return x - Full<A>{};  // which is x, of -0 too
}

// Lane l of the result is lane index[l] of x.
template <class A>
inline Full<A> pick(Full<A> x, LaneIndex<A> index) {
#if defined(__GNUC__) && !defined(__clang__)
  return __builtin_shuffle(x, index);
#else
  Full<A> y;
  for (int l = 0; l < kLanes<A>; ++l) y[l] = x[index[l]];
  return y;
#endif
}

// The indices by which the lanes of a bundle's outputs pick input 0 of their groups; for merged
// groups, all of which are in one vector.
template <class A>
inline LaneIndex<A> first_inputs(const GroupedLayout& layout) {
  LaneIndex<A> index = {};
  if (layout.merged == 1) return index;
  for (int64_t lane = 0; lane < layout.merged * layout.out; ++lane) {
    index[lane] = lane / layout.out * layout.in;
  }
  return index;
}

// The first `count` lanes.
template <class A>
inline void store_some(A* to, Full<A> x, int64_t count) {
  if (count >= kLanes<A>) return store<kLanes<A>>(to, x);
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>) {
    __m512 wide;
    std::memcpy(&wide, &x, sizeof(x));
    return _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1), wide);
  }
#endif
  A lanes[kLanes<A>];
  std::memcpy(lanes, &x, sizeof(x));
  for (int64_t l = 0; l < count; ++l) to[l] = lanes[l];
}

}  // namespace
}  // namespace convmae
