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
constexpr int kPieceChannels = 4;                  // of a warp

// The weights of a channel as 15 x 16, the taps from [4][4] on and zeros around them; and once more,
// moved by one column, so that any two taps that are neighbours in a row are a word.
struct alignas(16) Taps {
  uint16_t values[2][kPieceChannels][15][16];
};

// The shared memory of a thread block. Pieces lie by the row and column of the neighbour, by piece,
// then as the words of a Fragment lie in lanes. What no kernel reaches of a neighbour stays zero.
struct TensorMemory {
  Piece pieces[3][3][kTensorWarps][4][32];
  Piece zeros[4][32];  // stand for hidden tiles
  // Of the tiles of two groups: the first position of each neighbour, -1: hidden.
  int32_t neighbours[2][kTensorTiles][3][4];
  // Of two groups: a bit for each visible neighbour, the eight tiles of the first one lowest.
  uint32_t visible[2][4];

  static constexpr int kZeroed = int(sizeof(pieces) + sizeof(zeros)) / kTensorWarps;  // by a warp
};
static_assert(TensorMemory::kZeroed % 16 == 0 && int(sizeof(Taps)) <= TensorMemory::kZeroed);

// A lane's part of the matrices of its warp's channels. The 16 inputs and outputs of a tile are in
// Z-order, so words have two inputs that are neighbours in a row, and both inputs and outputs 8
// further on are two rows below.
template <class T>
__device__ inline void load_matrices(const MaskedConv2dForward& p, int lane, int64_t channel,
                                     Taps& taps, uint32_t (&matrix)[3][3][kPieceChannels][4]) {
  for (int i = lane; i < int(sizeof(Taps) / sizeof(Chunk)); i += 32) {
    reinterpret_cast<Chunk*>(&taps)[i] = {};
  }
  __syncwarp();
  const uint16_t* const weight = static_cast<const uint16_t*>(p.weight) + channel * 49;
  const int count = int(min(int64_t(kPieceChannels), p.channels - channel)) * 49;
  for (int i = lane; i < count; i += 32) {
    const int c = i / 49, row = i % 49 / 7 + 4, column = i % 7 + 4;
    const uint16_t value = weight[i];
    taps.values[0][c][row][column] = value;
    taps.values[1][c][row][column - 1] = value;
  }
  __syncwarp();
  const int output = lane / 4, input = lane % 4 * 2;
  const int row = 7 + zorder_row(input) - zorder_row(output);
  const int column = 7 + zorder_column(input) - zorder_column(output);
  const int odd = column & 1;
#pragma unroll
  for (int n = 0; n < 9; ++n) {
    const int below = n / 3 - 1, right = n % 3 - 1;
#pragma unroll
    for (int c = 0; c < kPieceChannels; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int down = 4 * below + 2 * (i / 2) - 2 * (i % 2);
        const uint16_t* const pair = &taps.values[odd][c][row + down][column - odd + 4 * right];
        matrix[n / 3][n % 3][c][i] = *reinterpret_cast<const uint32_t*>(pair);
      }
    }
  }
}

// What a lane copies: of the positions with its place in each of the four squares of 2x2 of a tile,
// one piece.
struct TensorCopies {
  const char* from;  // its piece of the position with its place in the first square of tile 0
  uint32_t position_bytes;
  int place, piece;
  bool lower, right;  // its place in a square

  __device__ TensorCopies(const MaskedConv2dForward& p, int lane, int64_t slice)
      : position_bytes(uint32_t(p.channels * 2)), place(lane / 8), piece(lane % 8) {
    // Lanes beyond the last channel copy again what the last one copies.
    const uint32_t byte = min(uint32_t(slice) * 64 + piece * 8, position_bytes - 8);
    from = kept(static_cast<const char*>(p.x) + byte + place * int64_t(position_bytes));
    lower = place / 2 == 1;
    right = place % 2 == 1;
  }

  // Starts the copies of what is visible of a row of three neighbours of tile `tile` of a group.
  template <int Row>
  __device__ void start(TensorMemory& memory, int parity, int tile) const {
    const Chunk entries = *reinterpret_cast<const Chunk*>(memory.neighbours[parity][tile][Row]);
    Piece* const to = &memory.pieces[Row][0][piece][0][(tile * 4 + place) ^ (piece << 1)];
    unroll<3>([&](auto column) {
      const int32_t neighbour = int32_t(entries.words[column]);
      if (neighbour < 0) return;
      unroll<4>([&](auto square) {
        // A 7x7 kernel reaches three of the four rows or columns of a neighbour.
        if constexpr (Row == 0 && square / 2 == 0) {
          if (!lower) return;
        }
        if constexpr (Row == 2 && square / 2 == 1) {
          if (lower) return;
        }
        if constexpr (column == 0 && square % 2 == 0) {
          if (!right) return;
        }
        if constexpr (column == 2 && square % 2 == 1) {
          if (right) return;
        }
        copy_piece(to + column * (kTensorWarps * 128) + square * 32,
                   advance(from, neighbour + 4 * square, position_bytes));
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

  __device__ int32_t find(const MaskedConv2dForward& p, int32_t first, int32_t last) const {
    return finds && first + tile < last ? finder.find(p, first + tile) : -1;
  }
  __device__ void write(TensorMemory& memory, int parity, int warp, int lane, int32_t found) const {
    if (warp * 4 >= Surroundings<4, 7>::kTiles) return;
    const uint32_t visible = __ballot_sync(0xffffffffu, found >= 0);
    if (finds) memory.neighbours[parity][tile][neighbour / 3][neighbour % 3] = found;
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
    const int row = zorder_row(position) + tap / 7 + 1, column = zorder_column(position) + tap % 7 + 1;
    const int64_t tile = neighbours[row / 4][column / 4];
    if (tile < 0) continue;
    const int64_t at = tile + zorder(row % 4, column % 4);
    sum += load(weight + tap) * load(static_cast<const T*>(p.x) + at * p.channels + channel);
  }
  return sum;
}

// Launch: grid (p.slices of 64 bytes, p.runs), block (32, kTensorWarps), sizeof(TensorMemory) bytes
// of shared memory. Needs channels in fours, x and y aligned to 8 bytes; tiles of 4x4, K = 7.
template <class T>
__global__ void __launch_bounds__(32 * kTensorWarps) masked_conv2d_tensor(MaskedConv2dForward p) {
  extern __shared__ __align__(16) char shared[];
  TensorMemory& memory = *reinterpret_cast<TensorMemory*>(shared);
  const int lane = threadIdx.x, warp = __shfl_sync(0xffffffffu, int(threadIdx.y), 0);
  const int64_t slice = blockIdx.x, run = blockIdx.y;
  const int64_t channel = slice * (kTensorWarps * kPieceChannels) + warp * kPieceChannels;
  const bool has_channels = channel < p.channels;
  const int32_t begin = int32_t(run * p.tiles_per_run);
  const int32_t last = int32_t(min(begin + p.tiles_per_run, p.tiles));

  const TensorFinder finder(p, warp * 32 + lane);
  const int32_t first_found = finder.find(p, begin, last);
  int32_t found = finder.find(p, begin + kTensorTiles, last);
  char* const own = reinterpret_cast<char*>(memory.pieces) + warp * TensorMemory::kZeroed;
  uint32_t matrix[3][3][kPieceChannels][4] = {};
  float bias[kPieceChannels] = {};
  if (has_channels) {
    load_matrices<T>(p, lane, channel, *reinterpret_cast<Taps*>(own), matrix);
    if (p.bias != nullptr) {
#pragma unroll
      for (int c = 0; c < kPieceChannels; ++c) {
        // + 0: a sum is never -0, so what is added for hidden tiles changes no bit.
        bias[c] = load(static_cast<const T*>(p.bias) + channel + c) + 0.0f;
      }
    }
  }
  __syncwarp();
  for (int i = lane; i < TensorMemory::kZeroed / int(sizeof(Chunk)); i += 32) {
    reinterpret_cast<Chunk*>(own)[i] = {};
  }
  finder.write(memory, 0, warp, lane, first_found);
  __syncthreads();
  const TensorCopies copies(p, lane, slice);
  copies.start<0>(memory, 0, warp);
  copies_commit();
  copies.start<1>(memory, 0, warp);
  copies_commit();

  // The lane's words of the pieces of its tile, and its results.
  const Piece* const pieces = &memory.pieces[0][0][warp][0][lane ^ (warp << 1)];
  const Piece* const zeros = &memory.zeros[0][lane ^ (warp << 1)];
  const int group = lane / 4, quad = lane % 4;
  char* const y = kept(static_cast<char*>(p.y) + channel * 2 +
                       (quad * 32 + group) * int64_t(copies.position_bytes));
  int parity = 0;
  for (int32_t first = begin; first < last; first += kTensorTiles, parity ^= 1) {
    float sum[kPieceChannels][4];
#pragma unroll
    for (int c = 0; c < kPieceChannels; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[c][i] = bias[c];
    }
    unroll<3>([&](auto row) {
      copies_wait_but_one();
      __syncthreads();
      if constexpr (row == 0) {
        finder.write(memory, parity ^ 1, warp, lane, found);
        found = finder.find(p, first + 2 * kTensorTiles, last);
      }
      copies.start<(row + 2) % 3>(memory, row == 0 ? parity : parity ^ 1, warp);
      copies_commit();
      unroll<3>([&](auto column) {
        constexpr int n = row * 3 + column;
        const uint32_t visible = memory.visible[parity][n / 4] >> n % 4 * 8 & 0xff;
        if (visible == 0) return;
        const Piece* from = pieces + n * (kTensorWarps * 128);
        if ((visible >> group & 1) == 0) from = zeros;
        Piece piece[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) piece[i] = from[i * 32];
#pragma unroll
        for (int w = 0; w < 2; ++w) {
          const uint32_t words[4] = {piece[0].words[w], piece[1].words[w], piece[2].words[w],
                                     piece[3].words[w]};
          multiply_pairs<T, 0>(sum[2 * w], matrix[row][column][2 * w], words);
          multiply_pairs<T, 1>(sum[2 * w + 1], matrix[row][column][2 * w + 1], words);
        }
      });
    });
    if (!has_channels) continue;
    float check = 0;
    char* const out = advance(y, first * 16, copies.position_bytes);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Piece result;
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        const float pair[2] = {sum[2 * w][i], sum[2 * w + 1][i]};
        result.words[w] = pack(T{}, pair);
        check = pair[0] * pair[1] + check;
      }
      if (first + 2 * quad + i % 2 >= last) continue;
      store_piece(result, advance(out, i / 2 * 8 + i % 2 * 16, copies.position_bytes));
    }
    // Zero times infinity or NaN is NaN: an output that is not finite may owe it to an input out of
    // its reach.
    if (is_finite(check)) continue;
#pragma unroll 1
    for (int i = 0; i < 4 * kPieceChannels; ++i) {
      const int tile = 2 * quad + i % 2, position = group + i / 2 % 2 * 8;
      if (first + tile >= last) continue;
      T* const result = static_cast<T*>(p.y) +
                        (int64_t(first + tile) * 16 + position) * p.channels + channel + i / 4;
      if (is_finite(load(result))) continue;
      store(sum_of_taps<T>(p, memory.neighbours[parity][tile], position, channel + i / 4), result);
    }
  }
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
