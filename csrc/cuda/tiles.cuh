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
  bool wide, has_word;
  uint32_t byte;  // of a position, where its copy begins

  __device__ Lane(int lane_, int slice, uint32_t position_bytes_, bool wide_)
      : lane(int(kept(uint32_t(lane_)))), position_bytes(position_bytes_), wide(wide_) {
    const uint32_t start = uint32_t(slice) * 128;
    byte = min(start + (wide ? lane % 8 * 16 : lane * 4), position_bytes - (wide ? 16 : 4));
    has_word = start + lane * 4 < position_bytes;
  }
};

// Finds the surroundings of tiles: lane n the n-th of them.
template <int S, int K>
struct Finder {
  using Around = Surroundings<S, K>;
  int below, right;
  const char* entry;  // of block 0 in the neighbour table, where a block is a tile

  __device__ Finder(const MaskedConv2dRuns& p, int lane)
      : below(Around::below(lane)), right(Around::right(lane)) {
    entry = reinterpret_cast<const char*>(p.neighbours + at(p, below, right));
  }

  // The column of the neighbour table for a block so far away.
  __device__ static int at(const MaskedConv2dRuns& p, int down, int across) {
    return (down + p.radius) * (2 * p.radius + 1) + across + p.radius;
  }

  // The first position of the lane's tile of the surroundings of `tile`; -1: hidden or outside.
  __device__ int32_t find(const MaskedConv2dRuns& p, int32_t tile) const {
    const int log = p.log_tiles;  // tiles in a row of a block: 1 << log
    const uint32_t row_bytes = uint32_t(p.table_columns) * uint32_t(sizeof(int32_t));
    if (log == 0) {
      const int32_t block = int32_t(load_word(advance(entry, tile, row_bytes)));
      return block < 0 ? -1 : block * (S * S);
    }
    const int last = (1 << log) - 1, inside = tile & ((1 << 2 * log) - 1);
    const int row = zorder_row(inside) + below, column = zorder_column(inside) + right;
    const int32_t block =
        p.neighbours[(tile >> 2 * log) * p.table_columns + at(p, row >> log, column >> log)];
    return block < 0 ? -1 : ((block << 2 * log) + zorder(row & last, column & last)) * (S * S);
  }
};

// The ranks, in their tile, of the four positions of neighbour N from the I-th on that are read, a
// byte each.
template <int S, int K, int N, int I>
CONVMAE_HD constexpr uint32_t pack_ranks() {
  using Around = Surroundings<S, K>;
  constexpr int columns = Around::count(Around::right(N));
  uint32_t ranks = 0;
  for (int i = I; i < I + 4 && i < Around::positions(N); ++i) {
    ranks |= uint32_t(zorder(Around::first(Around::below(N)) + i / columns,
                             Around::first(Around::right(N)) + i % columns))
             << 8 * (i - I);
  }
  return ranks;
}

// Starts the copies of those tiles that are visible around one; lane n knows the first position of
// the n-th. `from`: what the lane copies of position 0.
template <int S, int K>
__device__ inline void start_copies(const Lane& lane, const char* from, int32_t position,
                                    uint32_t visible, Chunk* places) {
  using Around = Surroundings<S, K>;
  if (lane.wide) {
    const int group = lane.lane / 8;
    unroll<Around::kTiles>([&](auto n) {
      if ((visible >> n & 1) == 0) return;
      constexpr int begin = Around::begin(n), positions = Around::positions(n);
      const int32_t tile = __shfl_sync(0xffffffffu, position, n);
      unroll<(positions + 3) / 4>([&](auto i) {
        constexpr uint32_t ranks = pack_ranks<S, K, n, 4 * i>();
        if (positions - 4 * i < 4 && group >= positions - 4 * i) return;
        copy_chunk(places + (begin + 4 * i) * 8 + lane.lane,
                   advance(from, tile + byte_of(ranks, group), lane.position_bytes));
      });
    });
    return;
  }
  unroll<Around::kTiles>([&](auto n) {
    if ((visible >> n & 1) == 0) return;
    constexpr int begin = Around::begin(n), columns = Around::count(Around::right(n));
    const int32_t tile = __shfl_sync(0xffffffffu, position, n);
#pragma unroll 1
    for (int i = 0; i < Around::positions(n); ++i) {
      const int rank = zorder(Around::first(Around::below(n)) + i / columns,
                              Around::first(Around::right(n)) + i % columns);
      copy_word(places[(begin + i) * 8 + lane.lane / 4].words + lane.lane % 4,
                advance(from, tile + rank, lane.position_bytes));
    }
  });
}

// Starts the copies of a tile alone, in the order of its positions in memory.
template <int S>
__device__ inline void copy_tile(const Lane& lane, const char* from, int32_t tile, Chunk* places) {
  const uint32_t first = tile * (S * S);
  if (lane.wide) {
#pragma unroll
    for (int i = 0; i < S * S; i += 4) {
      copy_chunk(places + i * 8 + lane.lane,
                 advance(from, first + i + lane.lane / 8, lane.position_bytes));
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < S * S; ++i) {
      copy_word(places[i * 8 + lane.lane / 4].words + lane.lane % 4,
                advance(from, first + i, lane.position_bytes));
    }
  }
}

// Calls compute(tile, visible, places) for the tiles [first, last), in order. `start_extra(tile,
// places)` starts the copies to the extra places. Before all, while the first tile is on its way,
// prepare(memory.places[1]) finds there what was copied to it before the call.
template <int S, int K, int Extra, class StartExtra, class Prepare, class Compute>
__device__ inline void walk_tiles(const MaskedConv2dRuns& p, const Lane& lane, int32_t first,
                                  int32_t last, TileMemory<S, K, Extra>& memory,
                                  StartExtra&& start_extra, Prepare&& prepare, Compute&& compute) {
  using Around = Surroundings<S, K>;
  if (first >= last) return;
  const char* const from = kept(static_cast<const char*>(p.x) + lane.byte);
  const Finder<S, K> finder(p, lane.lane);
  const bool finds = lane.lane < Around::kTiles;
  int32_t position = finds ? finder.find(p, first) : -1;  // of a neighbour of the next tile
  // Of `tile`, and of the next one. The first round starts copies only.
  Chunk *places = memory.places[1], *next_places = memory.places[0];
  uint32_t visible = 0;
  for (int32_t tile = first - 1; tile < last; ++tile) {
    copies_wait();
    __syncwarp();
    const uint32_t coming = __ballot_sync(0xffffffffu, position >= 0);
    if (tile + 1 < last) {
      start_copies<S, K>(lane, from, position, coming, next_places);
      start_extra(tile + 1, next_places + Around::kPlaces * 8);
      if (finds && tile + 2 < last) position = finder.find(p, tile + 2);
    }
    if (tile >= first) {
      compute(tile, visible, places);
    } else {
      prepare(places);
    }
    visible = coming;
    Chunk* const computed = places;
    places = next_places;
    next_places = computed;
  }
}

// Calls f(row, column, values) for every visible position that the kernel reads, relative to the
// tile's first one; `values` are the lane's channels. Rows and columns are constants once unrolled.
template <class T, int S, int K, class F>
__device__ inline void for_visible(const Lane& lane, uint32_t visible, const Chunk* places, F&& f) {
  using Around = Surroundings<S, K>;
  const uint32_t* words = places[lane.lane / 4].words + lane.lane % 4;
  unroll<Around::kTiles>([&](auto n) {
    constexpr int below = Around::below(n), right = Around::right(n), begin = Around::begin(n);
    constexpr int rows = Around::count(below), columns = Around::count(right);
    if ((visible >> n & 1) == 0) return;
#pragma unroll
    for (int i = 0; i < rows; ++i) {
#pragma unroll
      for (int j = 0; j < columns; ++j) {
        float values[kWordChannels<T>];
        unpack(T{}, words[(begin + i * columns + j) * 32], values);
        f(below * S + Around::first(below) + i, right * S + Around::first(right) + j, values);
      }
    }
  });
}

}  // namespace convmae::cuda
