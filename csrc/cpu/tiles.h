// What the depthwise convolution and its gradients share. A block is done in tiles of S x S
// positions (4 x 4, or 2 x 2 where it has no more; in Z-order the positions of a tile are
// neighbours in memory), a tile one vector of channels at a time: sums of a tile then stay in
// registers while all that it sees passes by, and whether it sees a tile is asked once for all that
// lies in it. In an anonymous namespace for the reason given in vec.h.
#pragma once

#include <initializer_list>

#include "cpu/vec.h"
#include "masked_conv2d.h"

#define CONVMAE_INLINE __attribute__((always_inline))

namespace convmae {
namespace {

// How a K x K kernel of dilation 1 looks from a tile: at `side` x `side` tiles, itself in the
// middle.
template <int K, int S>
struct Sight {
  static constexpr int reach = (K / 2 + S - 1) / S, side = 2 * reach + 1, tiles = side * side;
};

// The vectors that cover all channels. The last one begins earlier where their number is not a
// multiple: what it shares with the one before is computed twice, alike.
class Vectors {
 public:
  Vectors(int64_t channels, int64_t lanes)
      : channels_(channels), lanes_(lanes), count_((channels + lanes - 1) / lanes) {}
  int64_t count() const { return count_; }
  int64_t first_channel(int64_t vector) const {
    return vector + 1 < count_ ? vector * lanes_ : channels_ - lanes_;
  }

 private:
  const int64_t channels_, lanes_, count_;
};

// A kernel's weights, [vectors][taps][lanes]: those that are needed together lie together.
template <class T>
class TapTable {
 public:
  using A = Acc<T>;

  // `weight` is [channels][taps]. With `flipped` both axes of the kernel run the other way round.
  TapTable(const void* weight, int64_t channels, int64_t taps, bool flipped)
      : vectors_(channels, kLanes<A>), taps_(taps), table_(vectors_.count() * taps * kLanes<A>) {
    for (int64_t v = 0; v < vectors_.count(); ++v) {
      A* const to = table_.get() + v * taps * kLanes<A>;
      for (int64_t lane = 0; lane < kLanes<A>; ++lane) {
        const T* from = static_cast<const T*>(weight) + (vectors_.first_channel(v) + lane) * taps;
        for (int64_t tap = 0; tap < taps; ++tap) {
          to[(flipped ? taps - 1 - tap : tap) * kLanes<A> + lane] = to_acc(from[tap]);
        }
      }
    }
  }
  const A* operator[](int64_t vector) const { return table_.get() + vector * taps_ * kLanes<A>; }

 private:
  const Vectors vectors_;
  const int64_t taps_;
  Buffer<A> table_;
};

// Where the tiles that tile `tile` of a block sees lie in `features`; null where hidden.
template <class T, int K, int S>
inline void look(const cpu::MaskedConv2dWindow& p, const void* features, int64_t block,
                 int64_t tile, const T** seen) {
  const int32_t* rows = p.neighbours + block * p.table_columns;
  const int64_t positions = int64_t(p.side) * p.side;
  const Place* place = p.window + tile * Sight<K, S>::tiles;
  for (int i = 0; i < Sight<K, S>::tiles; ++i) {
    const int64_t row = rows[place[i].neighbour];
    seen[i] =
        row < 0 ? nullptr
                : static_cast<const T*>(features) + (row * positions + place[i].rank) * p.channels;
  }
}

// How far ahead of its tile a walk asks for the tiles that it looks around in: what lies below or
// to the right of a tile is wanted before its own turn comes.
constexpr int64_t kBytesAhead = 65536;

// Asks for a share of what later tiles will want: a walk that takes one vector of every position at
// a time is one that the machine does not foresee.
template <int S, class T>
inline void prefetch(const T* next, int64_t vector) {
  constexpr int64_t share = S * S * kVecBytes / (sizeof(Acc<T>) / sizeof(T)), line = 64;  // bytes
  const uintptr_t from = reinterpret_cast<uintptr_t>(next) + vector * share;
  for (int64_t i = 0; i < share; i += line) {
    __builtin_prefetch(reinterpret_cast<const void*>(from + i), 0, 2);
  }
}

// Calls f(vector, offset, seen) for every tile of the blocks [begin, end) and every vector of
// channels; a tile begins at `offset` elements in features of the shape of x, and `seen` are the
// tiles of `features` that it sees. A few tiles take turns with one vector, so that the weights of
// a vector are read from near memory.
template <class T, int K, int S, class F>
inline void for_tiles(const cpu::MaskedConv2dWindow& p, const void* features, int64_t begin,
                      int64_t end, std::initializer_list<const void*> touched, F&& f) {
  constexpr int together = S == 4 ? 1 : 8;
  const int64_t of_block = int64_t(p.side) * p.side / (S * S), last = end * of_block;
  const int64_t vectors = Vectors(p.channels, kLanes<Acc<T>>).count();
  const int64_t tile_bytes = S * S * p.channels * int64_t(sizeof(T));
  const int64_t ahead = kBytesAhead > together * tile_bytes ? kBytesAhead / tile_bytes : together;
  const T* seen[together][Sight<K, S>::tiles];
  for (int64_t tile = begin * of_block; tile < last; tile += together) {
    const int count = int(last - tile < together ? last - tile : together);
    for (int i = 0; i < count; ++i) {
      look<T, K, S>(p, features, (tile + i) / of_block, (tile + i) % of_block, seen[i]);
    }
    for (int64_t vector = 0; vector < vectors; ++vector) {
      for (int i = 0; i < count; ++i) {
        const int64_t offset = (tile + i) * S * S * p.channels;
        for (const void* other : touched) {
          const int64_t tiles = other == features ? ahead : together;
          prefetch<S>(static_cast<const T*>(other) + offset + tiles * S * S * p.channels, vector);
        }
        f(vector, offset, seen[i]);
      }
    }
  }
}

// -- convolution ------------------------------------------------------------------------------

// Adds what a row of a tile, `Column` tiles to the right, gives to two rows of outputs. `taps` is
// the kernel's row that the first of them meets it with, the second meets it with the row before.
template <class T, int K, int S, int Column, bool First, bool Second, class V>
CONVMAE_INLINE inline void convolve_row(const T* x, int64_t channels, const Acc<T>* taps,
                                        V (&sums)[2 * S]) {
  constexpr int lanes = kLanes<Acc<T>>;
  unroll<S>([&](auto c) CONVMAE_INLINE {
    constexpr int column = Column * S + decltype(c)::value;
    if constexpr (column + K / 2 >= 0 && column - (S - 1) <= K / 2) {
      const V value = load<lanes>(x + zorder(0, c) * channels);
      unroll<S>([&](auto o) CONVMAE_INLINE {
        constexpr int j = column - decltype(o)::value + K / 2;
        if constexpr (j >= 0 && j < K) {
          if constexpr (First) sums[o] += value * load<lanes>(taps + j * lanes);
          if constexpr (Second) sums[S + o] += value * load<lanes>(taps + (j - K) * lanes);
        }
      });
    }
  });
}

// The convolution of one tile and one vector: y = bias + ..., with the table of its taps. All
// pointers are at the vector's first channel but those in `seen`, to which `c` is added.
template <class T, int K, int S, class V>
inline void convolve_tile(const T* const* seen, int64_t c, int64_t channels, V bias,
                          const Acc<T>* taps, T* y) {
  constexpr int lanes = kLanes<Acc<T>>, reach = Sight<K, S>::reach;
  unroll<S / 2>([&](auto half) CONVMAE_INLINE {
    constexpr int first = 2 * decltype(half)::value;
    V sums[2 * S];
    unroll<2 * S>([&](auto o) CONVMAE_INLINE { sums[o] = bias; });
    unroll<Sight<K, S>::tiles>([&](auto i) CONVMAE_INLINE {
      constexpr int column = decltype(i)::value % Sight<K, S>::side - reach;
      // The kernel's row with which the first output row meets the first row of this tile.
      constexpr int base = (decltype(i)::value / Sight<K, S>::side - reach) * S - first + K / 2;
      if constexpr (base <= K && base + S > 0) {
        if (seen[i] == nullptr) return;
        const T* const tile = seen[i] + c;
        unroll<S>([&](auto r) CONVMAE_INLINE {
          constexpr int tap = base + decltype(r)::value;
          if constexpr (tap >= 0 && tap <= K) {
            // Weights of the row before are read again: kept, they would push sums out.
            asm volatile("" : "+r"(taps));
            convolve_row<T, K, S, column, (tap < K), (tap > 0)>(
                tile + zorder(r, 0) * channels, channels, taps + tap * K * lanes, sums);
          }
        });
      }
    });
    T* const to = y + zorder(first, 0) * channels;
    unroll<S>([&](auto o) CONVMAE_INLINE {
      store<lanes>(to + zorder(0, o) * channels, sums[o]);
      store<lanes>(to + zorder(1, o) * channels, sums[S + o]);
    });
  });
}

// -- gradient in the weight -------------------------------------------------------------------

// Adds what a tile of x and a tile of the output's gradient, `Row` and `Column` tiles from it, give
// to the gradients of the taps: [K * K][lanes]. A function of its own: all in one would take the
// compiler minutes.
template <class T, int K, int S, int Row, int Column>
__attribute__((noinline)) void correlate_tiles(const T* x, const T* grad, int64_t channels,
                                               Acc<T>* taps) {
  constexpr int lanes = kLanes<Acc<T>>;
  using V = Vec<Acc<T>, lanes>;
  // A position of x, o columns from its tile's first, and g columns from that of the other tile
  // meet with the tap o - g + shift of a row. The first rows of both tiles meet with its row
  // `base`.
  constexpr int shift = K / 2 - Column * S, base = K / 2 - Row * S;
  constexpr int low = shift - (S - 1) > 0 ? shift - (S - 1) : 0,
                high = shift + S < K ? shift + S : K;
  constexpr int first = base - (S - 1) > 0 ? base - (S - 1) : 0, last = base + S < K ? base + S : K;
  unroll<last - first>([&](auto t) CONVMAE_INLINE {
    constexpr int tap = first + decltype(t)::value;
    constexpr int behind = tap - base;  // rows of x behind those of the gradient
    constexpr int begin = behind > 0 ? behind : 0, end = behind < 0 ? S + behind : S;
    // From zero, as each addition to a long sum rounds anew.
    V sums[high - low];
    unroll<high - low>([&](auto k) CONVMAE_INLINE { sums[k] = V{}; });
    unroll<end - begin>([&](auto n) CONVMAE_INLINE {
      constexpr int r = begin + decltype(n)::value;
      const T* const from = x + zorder(r, 0) * channels;
      const T* const to = grad + zorder(r - behind, 0) * channels;
      V value[S];
      unroll<S>([&](auto o)
                    CONVMAE_INLINE { value[o] = load<lanes>(from + zorder(0, o) * channels); });
      unroll<S>([&](auto g) CONVMAE_INLINE {
        if constexpr (shift - decltype(g)::value < K && shift - decltype(g)::value + S - 1 >= 0) {
          const V weight = load<lanes>(to + zorder(0, g) * channels);
          unroll<S>([&](auto o) CONVMAE_INLINE {
            constexpr int k = decltype(o)::value - decltype(g)::value + shift;
            if constexpr (k >= 0 && k < K) sums[k - low] += weight * value[o];
          });
        }
      });
    });
    Acc<T>* const sum = taps + (tap * K + low) * lanes;
    unroll<high - low>([&](auto k) CONVMAE_INLINE {
      store<lanes>(sum + k * lanes, load<lanes>(sum + k * lanes) + sums[k]);
    });
  });
}

// The same of all tiles that it sees.
template <class T, int K, int S>
inline void correlate_tile(const T* x, const T* const* seen, int64_t c, int64_t channels,
                           Acc<T>* taps) {
  unroll<Sight<K, S>::tiles>([&](auto place) CONVMAE_INLINE {
    constexpr int row = decltype(place)::value / Sight<K, S>::side - Sight<K, S>::reach;
    constexpr int column = decltype(place)::value % Sight<K, S>::side - Sight<K, S>::reach;
    if (seen[place] == nullptr) return;
    correlate_tiles<T, K, S, row, column>(x, seen[place] + c, channels, taps);
  });
}

// The sum of a tile's positions.
template <class T, int S>
inline Vec<Acc<T>, kLanes<Acc<T>>> sum_tile(const T* x, int64_t channels) {
  Vec<Acc<T>, kLanes<Acc<T>>> sum = {};
  unroll<S * S>([&](auto i) CONVMAE_INLINE { sum += load<kLanes<Acc<T>>>(x + i * channels); });
  return sum;
}

// -- the choice of a kernel -------------------------------------------------------------------

// f(kernel side, tile side), as constants; false where the kernel for any shape must run.
template <class T, class F>
bool with_tiles(const cpu::MaskedConv2dWindow& p, F&& f) {
  if constexpr (!std::is_same_v<T, double>) {
    const auto with_kernel = [&](auto side) {
      switch (p.kernel_rows) {
        case 3: return f(Index<3>{}, side);
        case 5: return f(Index<5>{}, side);
        case 7: return f(Index<7>{}, side);
      }
    };
    switch (p.tile_side) {
      case 4: return with_kernel(Index<4>{}), true;
      case 2: return with_kernel(Index<2>{}), true;
    }
  }
  return false;
}

}  // namespace
}  // namespace convmae
