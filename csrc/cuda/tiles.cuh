// The walk over tiles that the depthwise convolution and its weight gradient share.
//
// A tile is S x S positions, S = 2 or 4: a block of that side, or a part of a larger block, whose
// positions Z-order keeps together. So packed features of any block side are packed features
// [blocks * (side / S)^2, S * S, channels] of tiles; only the neighbour table, which is of blocks,
// has to be translated.
//
// A warp walks over consecutive tiles with 128 bytes of their channels, one word of 4 bytes for
// each lane; it shares nothing with other warps. While it computes a tile from shared memory, the
// positions of the next tile and its surroundings are on their way there, in 16-byte copies, and so
// are the table entries of the one after. Positions of hidden blocks are neither copied nor
// computed: whether a block is hidden is the same for the whole warp.
#pragma once

#include <type_traits>

#include "cuda/tile_memory.h"
#include "cuda/vec.cuh"
#include "masked_conv2d.h"
#include "unroll.h"

namespace convmae::cuda {

// What a lane copies of a position: `wide`, 8 lanes copy 16 bytes each; else every lane its word.
// Lanes beyond the last channel copy again what the last one copies.
struct Lane {
  int lane;
  uint32_t position_bytes;  // of all channels
  bool wide;
  bool has_word, has_copy;  // the lane's word exists; what it copies is not the last one's again
  uint32_t byte;            // of a position, where its copy begins

  __device__ Lane(int lane_, int slice, uint32_t position_bytes_, bool wide_)
      : lane(int(kept(uint32_t(lane_)))), position_bytes(position_bytes_), wide(wide_) {
    const uint32_t start = uint32_t(slice) * 128;
    byte = min(start + (wide ? lane % 8 * 16 : lane * 4), position_bytes - (wide ? 16 : 4));
    has_word = start + lane * 4 < position_bytes;
    has_copy = start + (wide ? lane % 8 * 16 : lane * 4) < position_bytes;
  }

  // Which of the positions that are copied at a time.
  __device__ int group() const { return wide ? lane / 8 : 0; }

  // The lane's word of the first place, and where its copies of the first positions go to.
  __device__ uint32_t* words(Chunk* places) const {
    return kept_shared(places[lane / 4].words + lane % 4);
  }
  __device__ Chunk* copies(Chunk* places) const {
    return wide ? kept_shared(places + lane) : reinterpret_cast<Chunk*>(words(places));
  }

  // What the lane copies of the first positions of features, in a register.
  template <class Void>
  __device__ auto of(Void* features) const {
    using Byte = std::conditional_t<std::is_const_v<Void>, const char, char>;
    return kept(static_cast<Byte*>(features) + byte + uint32_t(group()) * position_bytes);
  }
};

// Finds the surroundings of tiles: lane n the n-th of them. Lanes beyond find the last one.
template <int S, int K>
struct Finder {
  using Around = Surroundings<S, K>;
  int below, right;
  const char* entry;  // of block 0 in the neighbour table, where a block is a tile

  __device__ Finder(const MaskedConv2dRuns& p, int lane)
      : below(Around::below(min(lane, Around::kTiles - 1))),
        right(Around::right(min(lane, Around::kTiles - 1))) {
    entry = reinterpret_cast<const char*>(p.neighbours + at(p, below, right));
  }

  // The column of the neighbour table for a block so far away.
  __device__ static int at(const MaskedConv2dRuns& p, int down, int across) {
    return (down + p.radius) * (2 * p.radius + 1) + across + p.radius;
  }

  // The first position of the lane's tile of the surroundings of `tile`; negative: hidden or
  // outside.
  __device__ int32_t find(const MaskedConv2dRuns& p, int32_t tile) const {
    const int log = p.log_tiles;  // tiles in a row of a block: 1 << log
    const uint32_t row_bytes = uint32_t(p.table_columns) * uint32_t(sizeof(int32_t));
    if (log == 0) {
      return int32_t(load_word(advance(entry, tile, row_bytes))) * (S * S);
    }
    const int last = (1 << log) - 1, inside = tile & ((1 << 2 * log) - 1);
    const int row = zorder_row(inside) + below, column = zorder_column(inside) + right;
    const int32_t block =
        p.neighbours[(tile >> 2 * log) * p.table_columns + at(p, row >> log, column >> log)];
    return ((block << 2 * log) + zorder(row & last, column & last)) * (S * S);
  }
};

// The ranks of the four positions of neighbour N from the I-th place on, a byte each.
template <int S, int K, int N, int I>
CONVMAE_HD constexpr uint32_t pack_ranks() {
  using Around = Surroundings<S, K>;
  uint32_t ranks = 0;
  for (int i = I; i < I + 4 && i < Around::positions(N); ++i) {
    ranks |= uint32_t(Around::rank(N, i)) << 8 * (i - I);
  }
  return ranks;
}

// The first of them where they follow each other, as the groups of a warp do; else -1.
template <int S, int K, int N, int I>
CONVMAE_HD constexpr int in_a_row() {
  constexpr uint32_t first = pack_ranks<S, K, N, I>() & 0xff;
  return pack_ranks<S, K, N, I>() == first * 0x01010101u + 0x03020100u ? int(first) : -1;
}

// Starts the copies of those tiles that are visible around one; lane n knows the first position of
// the n-th. `from`: what the lane copies of the first positions; `places`: where to.
template <int S, int K>
__device__ CONVMAE_INLINE void start_copies(const Lane& lane, const char* from, int32_t position,
                                            uint32_t visible, Chunk* places) {
  using Around = Surroundings<S, K>;
  if (lane.wide) {
    unroll<Around::kTiles>([&](auto n) CONVMAE_INLINE_LAMBDA {
      if ((visible >> n & 1) == 0) return;
      constexpr int begin = Around::begin(n), positions = Around::positions(n);
      const int32_t tile = __shfl_sync(0xffffffffu, position, n);
      const char* at = from;
      unroll<(positions + 3) / 4>([&](auto i) CONVMAE_INLINE_LAMBDA {
        constexpr int rank = in_a_row<S, K, n, 4 * i>();
        if constexpr (rank < 0) {  // each group finds its own position
          if (positions - 4 * i < 4 && lane.group() >= positions - 4 * i) return;
          constexpr uint32_t ranks = pack_ranks<S, K, n, 4 * i>();
          at = advance(from, tile + int32_t(byte_of(ranks, lane.group())) - lane.group(),
                       lane.position_bytes);
        } else {
          constexpr int before = i == 0 ? -1 : in_a_row<S, K, n, 4 * (i > 0 ? i - 1 : 0)>();
          at = before < 0 ? advance(from, tile + rank, lane.position_bytes)
                          : at + uint64_t(rank - before) * lane.position_bytes;
        }
        copy_chunk(places + (begin + 4 * i) * 8, at);
      });
    });
    return;
  }
  unroll<Around::kTiles>([&](auto n) CONVMAE_INLINE_LAMBDA {
    if ((visible >> n & 1) == 0) return;
    constexpr int begin = Around::begin(n);
    const int32_t tile = __shfl_sync(0xffffffffu, position, n);
    Chunk* to = places + begin * 8;
#pragma unroll 1
    for (int rank = 0; rank < S * S; ++rank) {
      if (!Around::reads(n, rank)) continue;
      copy_word(to, advance(from, tile + rank, lane.position_bytes));
      to += 8;
    }
  });
}

// Starts the copies of a tile alone, in the order of its positions in memory; as `start_copies`.
template <int S>
__device__ CONVMAE_INLINE void copy_tile(const Lane& lane, const char* from, int32_t tile,
                                         Chunk* places) {
  const char* first = advance(from, tile * (S * S), lane.position_bytes);
  if (lane.wide) {
#pragma unroll
    for (int i = 0; i < S * S; i += 4, first += uint64_t(4) * lane.position_bytes) {
      copy_chunk(places + i * 8, first);
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < S * S; ++i, first += lane.position_bytes) copy_word(places + i * 8, first);
  }
}

// Calls compute(tile, visible, offset) for the tiles first, first + step, ... below `last`, with
// the window of each in `features`: at `offset` chunks of the first places. start_extra(tile,
// places) starts the copies to the extra places. Before all, while the first tile is on its way,
// prepare(memory.places[1]) finds there what was copied to it before the call.
template <int S, int K, int Extra, class StartExtra, class Prepare, class Compute>
__device__ CONVMAE_INLINE void walk_tiles(const MaskedConv2dRuns& p, const void* features,
                                          const Lane& lane, int32_t first, int32_t last,
                                          int32_t step, TileMemory<S, K, Extra>& memory,
                                          StartExtra&& start_extra, Prepare&& prepare,
                                          Compute&& compute) {
  using Around = Surroundings<S, K>;
  if (first >= last) return;
  const char* const from = lane.of(features);
  Chunk* const places = lane.copies(memory.places[0]);
  const Finder<S, K> finder(p, lane.lane);
  int32_t position = finder.find(p, first);  // of a neighbour of the next tile
  uint32_t visible = 0, next = 0;            // which places are for the next tile
  constexpr int kOther = memory.kPlaces * 8;
  // The first round starts copies only.
  for (int32_t tile = first - step; tile < last; tile += step) {
    copies_wait();
    __syncwarp();
    const uint32_t coming = __ballot_sync(0xffffffffu, position >= 0);
    if (tile + step < last) {
      start_copies<S, K>(lane, from, position, coming, places + next);
      start_extra(tile + step, places + next + Around::kPlaces * 8);
      position = finder.find(p, min(tile + 2 * step, last - 1));
    }
    next = kOther - next;
    if (tile >= first) {
      compute(tile, visible, next);
    } else {
      prepare(memory.places[1]);
    }
    visible = coming;
  }
}

// The window of a tile where `walk_tiles` has copied it.
template <int S, int K>
struct CopiedWindow {
  using Around = Surroundings<S, K>;
  const uint32_t* words;  // the lane's, of the first place

  // The lane's words of the n-th tile of the surroundings, and where among its places the position
  // of a rank is.
  template <int N>
  __device__ const uint32_t* tile(Index<N>) const {
    return words + Around::begin(N) * 32;
  }
  CONVMAE_HD static constexpr int place(int n, int rank) { return Around::place(n, rank); }
};

// Calls f(row, column, values) for every visible position that the kernel reads, relative to the
// tile's first one; `values` are the lane's channels. Rows and columns are constants once unrolled.
// The tile itself comes first: it is always visible, so sums begin there without a branch.
template <class T, int S, int K, class Window, class F>
__device__ CONVMAE_INLINE void for_visible(uint32_t visible, const Window& window, F&& f) {
  using Around = Surroundings<S, K>;
  constexpr int kCentre = Around::kTiles / 2;
  const auto look = [&](auto n) CONVMAE_INLINE_LAMBDA {
    constexpr int below = Around::below(n), right = Around::right(n);
    const uint32_t* const words = window.tile(n);
    unroll<S * S>([&](auto o) CONVMAE_INLINE_LAMBDA {
      constexpr int row = o / S, column = o % S, rank = zorder(row, column);
      if constexpr (Around::reads(n, rank)) {
        constexpr int place = Window::place(n, rank);
        float values[kWordChannels<T>];
        unpack(T{}, words[place * 32], values);
        f(below * S + row, right * S + column, values);
      }
    });
  };
  look(Index<kCentre>{});
  unroll<Around::kTiles>([&](auto n) CONVMAE_INLINE_LAMBDA {
    if constexpr (decltype(n)::value != kCentre) {
      if ((visible >> n & 1) != 0) look(n);
    }
  });
}

}  // namespace convmae::cuda
