// The walk over tiles that the depthwise convolution and its weight gradient share.
//
// A tile is S x S positions, S = 2 or 4: a block of that side, or a part of a larger block, whose
// positions Z-order keeps together. So packed features of any block side are packed features
// [blocks * (side / S)^2, S * S, channels] of tiles; only the neighbour table, which is of blocks,
// has to be translated.
//
// A thread block is one warp. It walks over a run of tiles with 128 bytes of their channels, one
// word of 4 bytes for each lane. While it computes a tile from shared memory, the positions of the
// next tile and its surroundings are on their way there, in 16-byte copies, and so are the table
// entries of the one after. Positions of hidden blocks are neither copied nor computed: whether a
// block is hidden is the same for the whole warp.
#pragma once

#include "cuda/vec.cuh"
#include "masked_conv2d.h"
#include "unroll.h"

namespace convmae::cuda {

// The surroundings of a tile under a K x K kernel: kSide x kSide tiles, in raster order. Of a tile
// `d` tiles below (right of) the centre, `count(d)` rows (columns) are read, from `first(d)` on. In
// shared memory the positions lie tile by tile, then in raster order; every tile begins at a
// multiple of 4 places, because a warp copies 4 positions at a time.
template <int S, int K>
struct Surroundings {
  static constexpr int kHalo = K / 2;
  static constexpr int kReach = (kHalo + S - 1) / S;
  static constexpr int kSide = 2 * kReach + 1;
  static constexpr int kTiles = kSide * kSide;

  CONVMAE_HD static constexpr int below(int tile) { return tile / kSide - kReach; }
  CONVMAE_HD static constexpr int right(int tile) { return tile % kSide - kReach; }
  CONVMAE_HD static constexpr int first(int d) { return d * S < -kHalo ? -kHalo - d * S : 0; }
  CONVMAE_HD static constexpr int count(int d) {
    return ((d + 1) * S > S + kHalo ? S + kHalo - d * S : S) - first(d);
  }
  CONVMAE_HD static constexpr int positions(int tile) {
    return count(below(tile)) * count(right(tile));
  }
  CONVMAE_HD static constexpr int begin(int tile) {
    int places = 0;
    for (int before = 0; before < tile; ++before) places += (positions(before) + 3) / 4 * 4;
    return places;
  }
  static constexpr int kPlaces = begin(kTiles);
};

// The shared memory of a warp: the places of two tiles and their surroundings, one that is computed
// and one that is on its way, and `Extra` more places with each. A place is 128 bytes.
template <int S, int K, int Extra>
struct TileMemory {
  using Around = Surroundings<S, K>;
  static constexpr int kPlaces = Around::kPlaces + Extra;

  Chunk places[2][kPlaces * 8];
  int32_t neighbours[2][Around::kTiles];
  int32_t offsets[Around::kPlaces];  // of a position in its tile, in bytes; -1: an unused place
};

// What a lane copies of a position: `wide`, 8 lanes copy 16 bytes each; else every lane its word.
struct Lane {
  int lane;
  int position_bytes;  // of all channels
  bool wide, copies, has_word;
  int64_t byte;  // of a position, where its copy begins

  __device__ Lane(int lane_, int64_t slice, int position_bytes_, bool wide_)
      : lane(lane_), position_bytes(position_bytes_), wide(wide_) {
    byte = slice * 128 + (wide ? lane % 8 * 16 : lane * 4);
    copies = byte < position_bytes;
    has_word = slice * 128 + lane * 4 < position_bytes;
  }
};

// The tile that lies at `neighbour` of the surroundings of `tile`; -1: hidden or outside.
template <class Around>
__device__ inline int32_t find_neighbour(const MaskedConv2dRuns& p, int64_t tile, int neighbour) {
  const int log = p.log_tiles, last = (1 << log) - 1;  // tiles in a row of a block: 1 << log
  const int inside = int(tile) & ((1 << 2 * log) - 1);
  const int row = zorder_row(inside) + Around::below(neighbour);
  const int column = zorder_column(inside) + Around::right(neighbour);
  const int entry = ((row >> log) + p.radius) * (2 * p.radius + 1) + (column >> log) + p.radius;
  const int32_t block = p.neighbours[(tile >> 2 * log) * p.table_columns + entry];
  return block < 0 ? -1 : (block << 2 * log) + zorder(row & last, column & last);
}

// Fills `offsets` of TileMemory.
template <int S, int K>
__device__ inline void fill_offsets(const Lane& lane, int32_t* offsets) {
  using Around = Surroundings<S, K>;
  for (int place = lane.lane; place < Around::kPlaces; place += 32) offsets[place] = -1;
  __syncthreads();
  unroll<Around::kTiles>([&](auto tile) {
    constexpr int top = Around::first(Around::below(tile)),
                  left = Around::first(Around::right(tile));
    constexpr int columns = Around::count(Around::right(tile));
    const int i = lane.lane;
    if (i < Around::positions(tile)) {
      offsets[Around::begin(tile) + i] =
          zorder(top + i / columns, left + i % columns) * lane.position_bytes;
    }
  });
}

// Starts the copies of what is visible around a tile; returns which of the tiles are, as bits.
template <int S, int K>
__device__ inline uint32_t start_copies(const Lane& lane, const void* x, const int32_t* neighbours,
                                        const int32_t* offsets, Chunk* places) {
  using Around = Surroundings<S, K>;
  uint32_t visible = 0;
  unroll<Around::kTiles>([&](auto n) {
    constexpr int begin = Around::begin(n), positions = Around::positions(n);
    const int32_t tile = neighbours[n];
    if (tile < 0) return;
    visible |= 1u << n;
    const char* from =
        static_cast<const char*>(x) + lane.byte + int64_t(tile) * (S * S * lane.position_bytes);
    if (lane.wide) {
#pragma unroll
      for (int i = 0; i < positions; i += 4) {
        const int place = begin + i + lane.lane / 8;
        const int32_t offset = offsets[place];
        if (offset >= 0 && lane.copies) {
          copy_chunk(places + place * 8 + lane.lane % 8, from + offset);
        }
      }
    } else if (lane.copies) {
#pragma unroll 1
      for (int place = begin; place < begin + positions; ++place) {
        copy_word(places[place * 8 + lane.lane / 4].words + lane.lane % 4, from + offsets[place]);
      }
    }
  });
  return visible;
}

// Starts the copies of a tile alone, in the order of its positions in memory.
template <int S>
__device__ inline void copy_tile(const Lane& lane, const void* x, int64_t tile, Chunk* places) {
  const char* from = static_cast<const char*>(x) + lane.byte + tile * (S * S * lane.position_bytes);
  if (!lane.copies) return;
  if (lane.wide) {
#pragma unroll
    for (int i = lane.lane / 8; i < S * S; i += 4) {
      copy_chunk(places + i * 8 + lane.lane % 8, from + i * int64_t(lane.position_bytes));
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < S * S; ++i) {
      copy_word(places[i * 8 + lane.lane / 4].words + lane.lane % 4,
                from + i * int64_t(lane.position_bytes));
    }
  }
}

// Calls compute(tile, visible, places) for the tiles [first, last), in order. `start_extra(tile,
// places)` starts the copies to the extra places. Before all, while the first tile is on its way,
// prepare(memory.places[1]) finds there what was copied to it before the call.
template <int S, int K, int Extra, class StartExtra, class Prepare, class Compute>
__device__ inline void walk_tiles(const MaskedConv2dRuns& p, const Lane& lane, int64_t first,
                                  int64_t last, TileMemory<S, K, Extra>& memory,
                                  StartExtra&& start_extra, Prepare&& prepare, Compute&& compute) {
  using Around = Surroundings<S, K>;
  if (first >= last) return;
  fill_offsets<S, K>(lane, memory.offsets);
  const bool finds = lane.lane < Around::kTiles;
  if (finds) memory.neighbours[0][lane.lane] = find_neighbour<Around>(p, first, lane.lane);
  int slot = 1;  // of `tile`; the other one is of the next. The first round starts copies.
  uint32_t visible = 0;
  for (int64_t tile = first - 1; tile < last; ++tile, slot ^= 1) {
    copies_wait();
    __syncthreads();
    uint32_t coming = 0;
    int32_t found = -1;
    if (tile + 1 < last) {
      coming = start_copies<S, K>(lane, p.x, memory.neighbours[slot ^ 1], memory.offsets,
                                  memory.places[slot ^ 1]);
      start_extra(tile + 1, memory.places[slot ^ 1] + Around::kPlaces * 8);
      if (finds && tile + 2 < last) found = find_neighbour<Around>(p, tile + 2, lane.lane);
    }
    if (tile >= first) {
      compute(tile, visible, memory.places[slot]);
    } else {
      prepare(memory.places[1]);
    }
    if (finds) memory.neighbours[slot][lane.lane] = found;
    visible = coming;
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

// f(side of a tile, side of the kernel), as constants.
template <class F>
void with_tile_shape(const MaskedConv2dRuns& p, F&& f) {
  const auto with_kernel = [&](auto side) {
    switch (p.kernel_rows) {
      case 3: return f(side, Index<3>{});
      case 5: return f(side, Index<5>{});
      case 7: return f(side, Index<7>{});
    }
  };
  p.tile_side == 2 ? with_kernel(Index<2>{}) : with_kernel(Index<4>{});
}

}  // namespace convmae::cuda
