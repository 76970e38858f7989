// Depthwise convolution of packed features by a 7x7 kernel on tensor cores, for half types.
//
// A channel's outputs of a tile of 4x4 positions are the product of a matrix of its weights, [16
// outputs, 16 inputs], with the inputs of that tile, and so for each of the eight tiles around it,
// whose matrices have zeros where an input is out of an output's reach. Eight tiles are the columns
// of the other factor. A word of memory holds two channels of a position; the instruction takes
// every other element of it (tensor_cores.cuh), so words are its operands as they lie in memory.
//
// Eight warps work on 64 bytes of channels, 4 channels each, whose matrices stay in registers for a
// whole run of tiles. While they compute what one row of three neighbours adds to a group of eight
// tiles, the next two rows of neighbours are on their way to shared memory.
#pragma once

#include "cuda/tensor_cores.cuh"
#include "cuda/tiles.cuh"

namespace convmae::cuda {

constexpr int kTensorTiles = 8, kTensorWarps = 8;  // of a group; of a thread block
constexpr int kTensorWords = 16;                   // of a slice of 64 bytes; two for each warp
constexpr int kTensorChannels = 4;                 // of a warp
constexpr int kTensorAhead = 4;  // groups: how early memory is asked for what they read

// The weights of a channel as 15 x 16, the taps from [4][4] on and zeros around them; and once
// more, moved by one column, so that any two taps that are neighbours in a row are a word.
struct alignas(16) Taps {
  uint16_t values[2][kTensorChannels][15][16];
};

// The shared memory of a thread block.
struct TensorMemory {
  // By the row and column of the neighbour, by word of the slice: for each lane of a Fragment its
  // four words, lane l at l ^ (word % 8), so that copies meet no conflicts either. What no kernel
  // reaches of a neighbour stays zero.
  Chunk words[3][3][kTensorWords][32];
  // Of the tiles of two groups: the first position of each neighbour, -1: hidden.
  int32_t neighbours[2][kTensorTiles][3][4];
  // Of two groups: a bit for each visible neighbour, the eight tiles of the first one lowest.
  uint32_t visible[2][4];
  // Outputs on their way to memory, by tile and position; five chunks and one more, for banks.
  Chunk results[kTensorTiles][81];

  static constexpr int kZeroed = int(sizeof(words)) / kTensorWarps;  // by a warp

  __device__ Chunk* result(int tile, int position) { return results[tile] + position * 5; }
};
static_assert(sizeof(Taps) <= TensorMemory::kZeroed && sizeof(TensorMemory) <= 99 << 10);

// A lane's part of the matrices of its warp's channels. The 16 inputs and outputs of a tile are in
// Z-order, so words have two inputs that are neighbours in a row, and both inputs and outputs 8
// further on are two rows below.
template <class T>
__device__ inline void load_matrices(const MaskedConv2dForward& p, int lane, int64_t channel,
                                     Taps& taps, uint32_t (&matrix)[9][kTensorChannels][4]) {
  for (int i = lane; i < int(sizeof(Taps) / sizeof(Chunk)); i += 32) {
    reinterpret_cast<Chunk*>(&taps)[i] = {};
  }
  __syncwarp();
  const uint16_t* const weight = static_cast<const uint16_t*>(p.weight) + channel * 49;
  for (int i = lane; i < kTensorChannels * 49; i += 32) {
    const int c = i / 49, row = i % 49 / 7 + 4, column = i % 7 + 4;
    const uint16_t value = weight[p.flipped ? i / 49 * 98 + 48 - i : i];
    taps.values[0][c][row][column] = value;
    taps.values[1][c][row][column - 1] = value;
  }
  __syncwarp();
  const int output = lane / 4, input = lane % 4 * 2;
  const int row = 7 + zorder_row(input) - zorder_row(output);
  const int column = 7 + zorder_column(input) - zorder_column(output), odd = column & 1;
  // Volatile: factors need registers in fours, so words that are equal are read twice.
  const volatile uint32_t* const words =
      reinterpret_cast<const volatile uint32_t*>(&taps.values[odd][0][row][column - odd]);
  unroll<9>([&](auto n) {
    unroll<kTensorChannels * 4>([&](auto ci) {
      constexpr int below = n / 3 - 1, right = n % 3 - 1, c = ci / 4, i = ci % 4;
      constexpr int down = 4 * below + 2 * (i / 2) - 2 * (i % 2);
      matrix[n][c][i] = words[(c * 15 + down) * 8 + 2 * right];
    });
  });
}

// Bytes between the words of two neighbours and between those of a neighbour that lie 32 bytes
// apart in memory; between the results of two tiles.
constexpr int kNeighbourBytes = kTensorWords * 512, kHalfBytes = kNeighbourBytes / 2;
constexpr int kResultBytes = 81 * 16;

// Copies the neighbours of a warp's tile of a group. A lane copies two words, 32 bytes apart, of
// the positions of one of the four squares of 2x2 of a neighbour.
struct TensorCopies {
  const char* from;     // its first word of the first position of its square of tile 0
  SharedAddress to[4];  // where they go for the first neighbour
  SharedAddress zeros;  // its part of what is cleared for a hidden one
  uint32_t position_bytes;
  uint32_t squares;  // bit 3 * r + c for r = 0, and 1 if the square is a lower one, 2 if not; and
                     // for c = 0, and 1 if it is a right one, 2 if not

  __device__ TensorCopies(const MaskedConv2dForward& p, uint32_t position_bytes_, Chunk* words,
                          int lane, int tile, int64_t slice_byte)
      : to{at(words, lane, tile, 0), at(words, lane, tile, 1), at(words, lane, tile, 2),
           at(words, lane, tile, 3)},
        zeros(words + lane % 8 * 32 + ((tile * 4 + lane / 8) ^ lane % 8)),
        position_bytes(position_bytes_) {
    const int square = lane / 8;
    from = kept(static_cast<const char*>(p.x) + slice_byte + lane % 8 * 4 +
                4 * square * p.channels * 2);
    squares =
        kept((square % 2 == 1 ? 0b011u : 0b101u) * (square / 2 == 1 ? 0b001001u : 0b1000001u));
  }

  __device__ static SharedAddress at(Chunk* words, int lane, int tile, int i) {
    const int word = lane % 8;
    return SharedAddress(words[word * 32 + ((tile * 4 + i) ^ word)].words + lane / 8);
  }

  // Starts the copies of a row of three neighbours. Of the four rows, or columns, of a neighbour a
  // 7x7 kernel reaches three.
  template <int Row>
  __device__ void start(const int32_t (&neighbours)[3][4]) const {
    const Chunk entries = *reinterpret_cast<const Chunk*>(neighbours[Row]);
    unroll<3>([&](auto column) {
      constexpr int to_first = (Row * 3 + column) * kNeighbourBytes;
      const int32_t neighbour = int32_t(entries.words[column]);
      if (neighbour < 0) {
        zeros.clear<to_first>();
        zeros.clear<to_first + kHalfBytes>();
        return;
      }
      const char* x = advance(from, neighbour, position_bytes);
      unroll<4>([&](auto i) {
        constexpr int r = Row == 0 && i / 2 == 0 ? 1 : Row == 2 && i / 2 == 1 ? 2 : 0;
        constexpr int c = column == 0 && i % 2 == 0 ? 1 : column == 2 && i % 2 == 1 ? 2 : 0;
        const uint32_t wanted = r + c == 0 ? 1 : squares & 1u << (3 * r + c);
        to[i].template copy_two_words<to_first, kHalfBytes, 32>(x, wanted);
        x += position_bytes;
      });
    });
  }
};

// Finds the neighbours of a group of tiles: thread 8 * n + t the n-th one of its tile t.
struct TensorFinder {
  Finder<4, 7> finder;
  int tile, neighbour;
  bool finds;

  __device__ TensorFinder(const MaskedConv2dForward& p, int thread)
      : finder(p, thread / 8),
        tile(thread % 8),
        neighbour(thread / 8),
        finds(neighbour < Surroundings<4, 7>::kTiles) {}

  using Found = Finder<4, 7>::Found;

  __device__ Found load(const MaskedConv2dForward& p, int32_t first, int32_t last) const {
    return finds && first + tile < last ? finder.load(p, first + tile) : Found{-1, 0};
  }
  __device__ void write(TensorMemory& memory, int parity, int warp, int lane,
                        const Found& found) const {
    if (warp * 4 >= Surroundings<4, 7>::kTiles) return;
    const int32_t position = finder.position(found);
    const uint32_t visible = __ballot_sync(0xffffffffu, position >= 0);
    if (finds) memory.neighbours[parity][tile][neighbour / 3][neighbour % 3] = position;
    if (lane == 0) memory.visible[parity][warp] = visible;
  }
};

// The sum of one output of a tile by multiply-adds, in the order of the taps.
template <class T>
__device__ inline float sum_of_taps(const MaskedConv2dForward& p, const int32_t (&neighbours)[3][4],
                                    int position, int64_t channel) {
  const T* const weight = static_cast<const T*>(p.weight) + channel * 49;
  float sum = p.bias == nullptr ? 0 : load(static_cast<const T*>(p.bias) + channel);
#pragma unroll 1
  for (int tap = 0; tap < 49; ++tap) {
    const int row = zorder_row(position) + tap / 7 + 1;
    const int column = zorder_column(position) + tap % 7 + 1;
    const int64_t tile = neighbours[row / 4][column / 4];
    if (tile < 0) continue;
    const int64_t at = tile + zorder(row % 4, column % 4);
    sum += load(weight + (p.flipped ? 48 - tap : tap)) *
           load(static_cast<const T*>(p.x) + at * p.channels + channel);
  }
  return sum;
}

// Computes those of a lane's results again that are NaN, without tensor cores: of two tiles two
// positions, eight apart, of the warp's channels, the first of which has this place in a result.
template <class T>
__device__ inline void sum_again(const MaskedConv2dForward& p, TensorMemory& memory, int parity,
                                 int first_tile, int first_position, int place, int64_t channel) {
#pragma unroll 1
  for (int i = 0; i < 4 * kTensorChannels; ++i) {
    const int tile = first_tile + i % 2, position = first_position + i / 2 % 2 * 8, c = i / 4;
    T* const result = reinterpret_cast<T*>(memory.result(tile, position)) + place + c;
    const float sum = load(result);
    if (sum == sum) continue;
    store(sum_of_taps<T>(p, memory.neighbours[parity][tile], position, channel + c), result);
  }
}

// Launch: grid (p.slices of 64 bytes, p.runs), block (32, kTensorWarps), sizeof(TensorMemory) bytes
// of shared memory. Needs 32 channels or more, in eights, x and y aligned to 16 bytes; tiles of 4x4
// and K = 7. The last slice begins earlier than the others would let it, so that it is whole.
template <class T>
__global__ void __launch_bounds__(32 * kTensorWarps) masked_conv2d_tensor(MaskedConv2dForward p) {
  extern __shared__ __align__(16) char shared[];
  TensorMemory& memory = *reinterpret_cast<TensorMemory*>(shared);
  const int lane = threadIdx.x, warp = __shfl_sync(0xffffffffu, int(threadIdx.y), 0);
  const int group = lane / 4, quad = lane % 4;
  const int64_t slice_byte = int64_t(blockIdx.x) * 64;
  const int64_t channel = slice_byte / 2 + warp * kTensorChannels;
  const int64_t begin = blockIdx.y * p.tiles_per_run;
  int32_t first = int32_t(begin);
  const int32_t last = int32_t(kept(uint32_t(min(begin + p.tiles_per_run, p.tiles))));

  // A thread of the first four warps has one position of a group.
  const char* const x =
      kept(static_cast<const char*>(p.x) + slice_byte + (warp * 32 + lane) * p.channels * 2);
  const uint32_t position_bytes = kept(uint32_t(p.channels * 2));
  const auto ask_for = [&](int32_t tile) {
    if (warp < 4 && tile + warp * 2 + lane / 16 < last) {
      prefetch(advance(x, tile * 16, position_bytes));
    }
  };
  for (int i = 1; i < kTensorAhead; ++i) ask_for(first + i * kTensorTiles);

  const TensorFinder finder(p, warp * 32 + lane);
  const auto found_first = finder.load(p, first, last);
  auto found = finder.load(p, first + kTensorTiles, last);
  char* const own = reinterpret_cast<char*>(memory.words) + warp * TensorMemory::kZeroed;
  uint32_t matrix[9][kTensorChannels][4];
  load_matrices<T>(p, lane, channel, *reinterpret_cast<Taps*>(own), matrix);
  float bias[kTensorChannels] = {};
  if (p.bias != nullptr) {
#pragma unroll
    for (int c = 0; c < kTensorChannels; ++c) {
      // + 0: a sum is never -0, so what is added for hidden tiles changes no bit.
      bias[c] = load(static_cast<const T*>(p.bias) + channel + c) + 0.0f;
    }
  }
  __syncwarp();
  for (int i = lane; i < TensorMemory::kZeroed / int(sizeof(Chunk)); i += 32) {
    reinterpret_cast<Chunk*>(own)[i] = {};
  }
  finder.write(memory, 0, warp, lane, found_first);
  __syncthreads();
  const TensorCopies copies(p, position_bytes, memory.words[0][0][0], lane, warp, slice_byte);
  copies.start<1>(memory.neighbours[0][warp]);
  copies_commit();
  copies.start<0>(memory.neighbours[0][warp]);
  copies_commit();

  // The lane's words, where it puts its outputs, and the two chunks of outputs that it stores.
  const int swizzled = lane ^ 2 * warp % 8;
  const SharedAddress words[2] = {SharedAddress(memory.words[0][0][2 * warp] + swizzled),
                                  SharedAddress(memory.words[0][0][2 * warp + 1] + (swizzled ^ 1))};
  const SharedAddress results(reinterpret_cast<Piece*>(memory.result(2 * quad, group)) + warp);
  const int row = warp * 8 + group;  // tile * 16 + position, and 64 more
  const SharedAddress stored(memory.result(row / 16, row % 16) + quad);
  char* const y = kept(static_cast<char*>(p.y) + slice_byte + quad * 16 + row * p.channels * 2);
  const uint32_t chosen[2] = {kept(kFirstOfPairs), kept(kSecondOfPairs)};
  const auto store_results = [&](int32_t tile) {
    if (tile + row / 16 < last) {
      store_chunk(stored.load<0>(), advance(y, tile * 16, position_bytes));
    }
    if (tile + row / 16 + 4 < last) {
      store_chunk(stored.load<4 * kResultBytes>(), advance(y, tile * 16 + 64, position_bytes));
    }
  };
  for (int parity = 0;; parity ^= 1) {
    float sum[kTensorChannels][4];
#pragma unroll
    for (int c = 0; c < kTensorChannels; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[c][i] = bias[c];
    }
    Chunk visible;
    // The tile's own row of neighbours comes first: the tile itself is always visible.
    unroll<3>([&](auto step) {
      constexpr int kOrder[5] = {1, 0, 2, 1, 0};
      copies_wait_but_one();
      __syncthreads();
      if constexpr (step == 1) ask_for(first + kTensorAhead * kTensorTiles);
      if constexpr (step == 0) {
        visible = *reinterpret_cast<const Chunk*>(memory.visible[parity]);
        if (first > int32_t(begin)) store_results(first - kTensorTiles);
        finder.write(memory, parity ^ 1, warp, lane, found);
        found = finder.load(p, first + 2 * kTensorTiles, last);
      }
      copies.start<kOrder[step + 2]>(memory.neighbours[step == 0 ? parity : parity ^ 1][warp]);
      copies_commit();
      unroll<3>([&](auto column) {
        constexpr int n = kOrder[step] * 3 + kOrder[column];
        if (n != 4 && (visible.words[n / 4] & 0xffu << n % 4 * 8) == 0) return;
        unroll<2>([&](auto w) {
          const Chunk b = words[w].template load<n * kNeighbourBytes>();
          multiply_pairs<T>(sum[2 * w], matrix[n][2 * w], b.words, chosen[0]);
          multiply_pairs<T>(sum[2 * w + 1], matrix[n][2 * w + 1], b.words, chosen[1]);
        });
      });
    });

    const auto round = [&] {
      unroll<4>([&](auto i) {
        Piece piece;
#pragma unroll
        for (int w = 0; w < 2; ++w) {
          const float pair[2] = {sum[2 * w][i], sum[2 * w + 1][i]};
          piece.words[w] = pack(T{}, pair);
        }
        results.store<i % 2 * kResultBytes + i / 2 * (8 * 80)>(piece);
      });
    };
    round();
    float check = 0;
#pragma unroll
    for (int c = 0; c < kTensorChannels; c += 2) {
#pragma unroll
      for (int i = 0; i < 4; ++i) check += sum[c][i] * sum[c + 1][i];
    }
    // Zero times infinity or NaN is NaN, so a sum that is not finite may owe it to an input out of
    // its reach. x - x is 0 for a finite x and NaN for others.
    if (!is_finite(check)) {
#pragma unroll
      for (int c = 0; c < kTensorChannels; ++c) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[c][i] += sum[c][i] - sum[c][i];
      }
      round();
      sum_again<T>(p, memory, parity, 2 * quad, group, warp * kTensorChannels, channel);
    }
    first += kTensorTiles;
    if (first >= last) break;
  }
  __syncthreads();
  store_results(first - kTensorTiles);
}

// Calls launch(kernel, grid, block, shared bytes, p), where p was planned for tensor cores.
template <class Launch>
void launch_masked_conv2d_tensor(const MaskedConv2dForward& p, Launch&& launch) {
  if (p.blocks == 0 || p.channels == 0) return;
  const auto with = [&](auto kernel) {
    launch(kernel, dim3(unsigned(p.slices), unsigned(p.runs)), dim3(32, kTensorWarps),
           sizeof(TensorMemory), p);
  };
  p.dtype == DType::BFloat16 ? with(masked_conv2d_tensor<BFloat16>)
                             : with(masked_conv2d_tensor<Half>);
}

}  // namespace convmae::cuda
