// The shared memory of the kernels on tiles. For the host too; no CUDA.
#pragma once

#include <cstdint>

#include "block.h"
#include "masked_conv2d.h"
#include "unroll.h"

namespace convmae::cuda {

// Sixteen bytes, the widest access to memory.
struct alignas(16) Chunk {
  uint32_t words[4];
};

// The surroundings of a tile under a K x K kernel: kSide x kSide tiles, in raster order. Of a tile
// `d` tiles below (right of) the centre, `count(d)` rows (columns) are read, from `first(d)` on. In
// shared memory the positions lie tile by tile, then in Z-order, as in global memory; every tile
// begins at a multiple of 4 places, because a warp copies 4 positions at a time.
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

  // Whether the position of that rank of a tile is read, and how many before it are.
  CONVMAE_HD static constexpr bool reads(int tile, int rank) {
    const int row = zorder_row(rank) - first(below(tile));
    const int column = zorder_column(rank) - first(right(tile));
    return row >= 0 && row < count(below(tile)) && column >= 0 && column < count(right(tile));
  }
  CONVMAE_HD static constexpr int place(int tile, int rank) {
    int before = 0;
    for (int r = 0; r < rank; ++r) before += reads(tile, r);
    return before;
  }
  // The rank of the position at a place.
  CONVMAE_HD static constexpr int rank(int tile, int place) {
    int rank = 0;
    while (!reads(tile, rank) || Surroundings::place(tile, rank) < place) ++rank;
    return rank;
  }
};

// The shared memory of a warp: the places of two tiles and their surroundings, one that is computed
// and one that is on its way, and `Extra` more places with each. A place is 128 bytes.
template <int S, int K, int Extra>
struct TileMemory {
  static constexpr int kPlaces = Surroundings<S, K>::kPlaces + Extra;

  Chunk places[2][kPlaces * 8];
};

// How many warps of the weight gradient a multiprocessor of an H100 holds at a time, in thread
// blocks of so many: 228 KiB of shared memory, of which a thread block takes 1 KiB more than its
// own.
template <int S, int K>
constexpr int reducing_warps_held(int warps) {
  return 233472 / (warps * int(sizeof(TileMemory<S, K, S * S>)) + 1024) * warps;
}

// Warps of a thread block of the weight gradient: up to four, as far as 48 KiB hold them and a
// multiprocessor as many as of single ones. Their shares are added up there, so that global memory
// sees one for all of them.
template <int S, int K>
constexpr int kReducingWarps = [] {
  int warps = 4;
  while (warps > 1 && (warps * sizeof(TileMemory<S, K, S * S>) > 49152 ||
                       reducing_warps_held<S, K>(warps) < reducing_warps_held<S, K>(1))) {
    warps /= 2;
  }
  return warps;
}();

// How many thread blocks of the weight gradient an H100 holds at a time.
template <int S, int K>
constexpr int kReducingBlocks =
    132 * reducing_warps_held<S, K>(kReducingWarps<S, K>) / kReducingWarps<S, K>;

// How many warps take the tiles of a run in turns, for all gradients at once; and how many shares
// of the sums they make.
template <int S, int K>
constexpr int kGradsWarps = S == 4 ? 8 : 4;
template <int S, int K>
constexpr int kGradsShares = kGradsWarps<S, K> / kReducingWarps<S, K>;

// How many such groups an H100 holds at a time: registers bound them, 8 warps for each
// multiprocessor on side 4 and 12 on side 2, unless shared memory does.
template <int S, int K>
constexpr int kGradsRuns = [] {
  const int by_registers = S == 4 ? 8 : 12;
  const int by_memory = reducing_warps_held<S, K>(kReducingWarps<S, K>);
  return 132 * (by_registers < by_memory ? by_registers : by_memory) / kGradsWarps<S, K>;
}();

// Whether a thread has registers for the weights and the sums of 7 x 7 taps of its channels, beside
// a tile of features and one of sums.
CONVMAE_HD constexpr bool fits_grads(int side, int kernel, int word_channels) {
  return kernel < 7 || side < 4 || word_channels == 1;
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
