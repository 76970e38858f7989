// What the kernels that move whole rows of channels share: elements by their size, the units that
// rows are moved in, thread blocks whose threads lie along the channels first, and the move itself.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/vec.cuh"

namespace convmae::cuda {

template <class F>
void with_size(int element_size, F&& f) {
  switch (element_size) {
    case 2: return f(uint16_t{});
    case 4: return f(uint32_t{});
    case 8: return f(uint64_t{});
  }
}

inline bool is_aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// f(fill, channels): one unit of the rows that start at `rows`, as wide as alignment allows, up to
// a Chunk, with `fill`, one element, in each of its elements; and the channels counted in units.
template <class F>
void with_unit(int element_size, const void* fill, const void* rows, int64_t channels, F&& f) {
  with_size(element_size, [&](auto element) {
    constexpr int n = int(sizeof(Chunk) / sizeof(element));
    std::memcpy(&element, fill, sizeof(element));
    if (channels % n != 0 || !is_aligned(rows, sizeof(Chunk))) return f(element, channels);
    Chunk chunk;
    for (int i = 0; i < n; ++i) {
      std::memcpy(reinterpret_cast<char*>(&chunk) + i * sizeof(element), &element, sizeof(element));
    }
    f(chunk, channels / n);
  });
}

// V channels that are read and written at once.
template <class T, int V>
struct alignas(V * sizeof(T)) Values {
  T value[V];
};

// 256 threads: up to 32 along the channels, the others along the positions.
inline dim3 block_of_rows(int64_t channels) {
  unsigned x = 1;
  while (x < 32 && x < channels) x *= 2;
  return dim3(x, 256 / x);
}

// Four positions for each thread, so 1024 at most for a thread block.
constexpr int kMaxRows = 4 * 256;
inline dim3 grid_of_rows(int64_t positions, dim3 block) {
  return dim3(unsigned((positions + 4 * block.y - 1) / (4 * block.y)));
}

// Writes the rows of all positions: what `from` holds from offset_of(position) on, or `fill` where
// that is -1. Offsets and channels are in units of E. Where a position comes from is found once for
// all its channels; a thread has up to four positions in flight.
// For a kernel on the grid and the thread blocks above.
template <class E, class OffsetOf>
__device__ inline void write_rows(const void* from, void* to, int64_t positions, int64_t channels,
                                  E fill, OffsetOf&& offset_of) {
  __shared__ int64_t offsets[kMaxRows];
  const int rows = 4 * blockDim.y;
  const int64_t first = int64_t(blockIdx.x) * rows;
  for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < rows; i += 256) {
    offsets[i] = first + i < positions ? offset_of(first + i) : -1;
  }
  __syncthreads();
  for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) {
    const E* const x = static_cast<const E*>(from) + c;
    E* const y = static_cast<E*>(to) + first * channels + c;
    E value[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = threadIdx.y + i * blockDim.y;
      value[i] = offsets[row] != -1 ? x[offsets[row]] : fill;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = threadIdx.y + i * blockDim.y;
      if (first + row < positions) y[row * channels] = value[i];
    }
  }
}

}  // namespace convmae::cuda
