// What the kernels that move whole rows of channels share on the host: elements by their size, and
// thread blocks whose threads lie along the channels first.
#pragma once

#include <cstdint>

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

}  // namespace convmae::cuda
