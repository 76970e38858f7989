// CPU kernel: convolution in groups of channels; compiled once for each instruction set,
// CONVMAE_ISA. Tiles of up to eight positions, of whatever blocks, have their sums in registers, so
// that a vector of weights that is read serves all of them.
#include "cpu/grouped.h"

namespace convmae {
namespace {

using cpu::GroupedConv2dForward;

constexpr int kTile = 8;
// Sums, weights and an input must fit in the registers: 32 with AVX-512, else 16.
constexpr bool kManyRegisters = kVecBytes == 64;
constexpr int kMaxVectors = 3;

// The positions of a chunk, in tiles.
template <class A>
class Tiles {
 public:
  Tiles(const GroupedConv2dForward& p, const Rows<A>& source)
      : p_(p),
        source_(source),
        capacity_((p.chunk_blocks * p.positions + kTile - 1) / kTile),
        seen_(capacity_ * p.layout.taps * kTile),
        any_(capacity_ * p.layout.taps),
        to_(capacity_ * kTile) {}

  void move_to(int64_t chunk) {
    const int64_t taps = p_.layout.taps, channels = p_.layout.groups * p_.layout.out;
    std::memset(any_.get(), 0, capacity_ * taps);
    const int64_t positions = for_positions(p_, chunk, [&](int64_t i, int64_t block, int64_t rank) {
      to_.get()[i] = static_cast<A*>(p_.y) + (block * p_.positions + rank) * channels;
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t row = source_row(p_, block, rank, tap);
        const int64_t at = i / kTile * taps + tap;
        seen_.get()[at * kTile + i % kTile] = row < 0 ? source_.zeros() : source_[row];
        any_.get()[at] |= row >= 0;
      }
    });
    count_ = (positions + kTile - 1) / kTile;
    for (int64_t i = positions; i < count_ * kTile; ++i) {  // nothing, to fill the last tile
      to_.get()[i] = nullptr;
      for (int64_t tap = 0; tap < taps; ++tap) {
        seen_.get()[(i / kTile * taps + tap) * kTile + i % kTile] = source_.zeros();
      }
    }
  }

  int64_t count() const { return count_; }
  // What the positions of a tile see, [taps][kTile], and whether any sees something, [taps].
  const A* const* seen(int64_t tile) const { return seen_.get() + tile * p_.layout.taps * kTile; }
  const char* any(int64_t tile) const { return any_.get() + tile * p_.layout.taps; }
  // Where the outputs of a tile go; null for none.
  A* const* to(int64_t tile) const { return to_.get() + tile * kTile; }

 private:
  const GroupedConv2dForward& p_;
  const Rows<A>& source_;
  const int64_t capacity_;
  const Buffer<const A*> seen_;
  const Buffer<char> any_;
  const Buffer<A*> to_;
  int64_t count_ = 0;
};

// What one call computes: `count` output channels from `out_channel` on, of inputs from
// `in_channel` on, with weights that begin at `weight`.
template <class A>
struct Piece {
  const A *weight, *bias;
  int64_t in_channel, out_channel, count;
  LaneIndex<A> first_inputs;
};

// P positions of a tile, V vectors of outputs.
template <class A, int P, int V, bool Merged>
void convolve(const GroupedLayout& layout, const Piece<A>& piece, const A* const* seen,
              const char* any, A* const* to) {
  constexpr int n = kLanes<A>;
  const int64_t row = layout.row();
  Full<A> sum[P][V];
  unroll<P>([&](auto p) { unroll<V>([&](auto v) { sum[p][v] = load<n>(piece.bias + v * n); }); });
  const A* weight = piece.weight;
  for (int64_t tap = 0; tap < layout.taps; ++tap, seen += kTile, weight += layout.in * row) {
    if (!any[tap]) continue;
    const A* x[P];
    unroll<P>([&](auto p) { x[p] = seen[p] + piece.in_channel; });
    const A* w = weight;
    if constexpr (Merged) {
      Full<A> inputs[P];
      unroll<P>([&](auto p) { inputs[p] = load<n>(x[p]); });
      LaneIndex<A> index = piece.first_inputs;
      for (int64_t i = 0; i < layout.in; ++i, w += row, index += 1) {
        const Full<A> factor = load<n>(w);
        unroll<P>([&](auto p) { sum[p][0] += pick<A>(inputs[p], index) * factor; });
      }
    } else {
      for (int64_t i = 0; i < layout.in; ++i, w += row) {
        Full<A> factor[V];
        unroll<V>([&](auto v) { factor[v] = load<n>(w + v * n); });
        unroll<P>([&](auto p) {
          const Full<A> input = all_lanes(x[p][i]);
          unroll<V>([&](auto v) { sum[p][v] += input * factor[v]; });
        });
      }
    }
  }
  unroll<P>([&](auto p) {
    if (to[p] == nullptr) return;
    unroll<V>([&](auto v) {
      store_some<A>(to[p] + piece.out_channel + v * n, sum[p][v], piece.count - v * n);
    });
  });
}

template <class A, int V, bool Merged>
void convolve_tiles(const GroupedLayout& layout, const Piece<A>& piece, const Tiles<A>& tiles) {
  constexpr int P = V == 1 || kManyRegisters ? kTile : kTile / 2;
  for (int64_t tile = 0; tile < tiles.count(); ++tile) {
    for (int p = 0; p < kTile; p += P) {
      convolve<A, P, V, Merged>(layout, piece, tiles.seen(tile) + p, tiles.any(tile),
                                tiles.to(tile) + p);
    }
  }
}

template <class A>
void convolve_chunks(const GroupedConv2dForward& p, int64_t begin, int64_t end) {
  const GroupedLayout& layout = p.layout;
  const Rows<A> source(p.source, p.blocks * p.source_positions, layout.groups * layout.in);
  Tiles<A> tiles(p, source);
  const A *const weight = static_cast<const A*>(p.weight), *const bias =
                                                               static_cast<const A*>(p.bias);
  const LaneIndex<A> index = first_inputs<A>(layout);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    tiles.move_to(chunk);
    for (int64_t bundle = 0; bundle < layout.bundles(); ++bundle) {
      // As few calls as possible, of as equal a number of vectors as possible.
      const int64_t vectors = layout.vectors();
      const int64_t calls = (vectors + kMaxVectors - 1) / kMaxVectors;
      for (int64_t call = 0; call < calls; ++call) {
        const int64_t first = call * vectors / calls, last = (call + 1) * vectors / calls;
        const int64_t lane = first * kLanes<A>;
        const Piece<A> piece = {
            weight + bundle * layout.taps * layout.in * layout.row() + lane,
            bias + bundle * layout.row() + lane,
            bundle * layout.merged * layout.in,
            bundle * layout.merged * layout.out + lane,
            layout.outputs(bundle) - lane,
            index,
        };
        if (layout.merged > 1) {
          convolve_tiles<A, 1, true>(layout, piece, tiles);
        } else {
          switch (last - first) {
            case 1: convolve_tiles<A, 1, false>(layout, piece, tiles); break;
            case 2: convolve_tiles<A, 2, false>(layout, piece, tiles); break;
            case 3: convolve_tiles<A, 3, false>(layout, piece, tiles); break;
          }
        }
      }
    }
  }
}

}  // namespace

namespace cpu {
template <>
void grouped_conv2d<Isa::CONVMAE_ISA>(const GroupedConv2dForward& p, int64_t begin, int64_t end) {
  static_assert(vector_bytes(Isa::CONVMAE_ISA) == kVecBytes);
  if (p.dtype == DType::Double) return convolve_chunks<double>(p, begin, end);
  convolve_chunks<float>(p, begin, end);
}
}  // namespace cpu
}  // namespace convmae
