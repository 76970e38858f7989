// CPU kernel: writes the windows of the blocks [begin, end), a row of positions after the other.
#include "gather_windows.h"

#include <algorithm>
#include <cstring>

#include "block.h"

namespace convmae::cpu {
namespace {

// Elements are only moved, so their size is all that matters.
template <class E>
void gather(const GatherWindowsParams& p, int64_t begin, int64_t end) {
  const int n = 2 * p.radius + 1;
  const int64_t positions = int64_t(p.side) * p.side, channels = p.channels;
  E fill;
  std::memcpy(&fill, p.fill, sizeof(E));
  E* y = static_cast<E*>(p.to) + begin * p.rows * p.columns * channels;
  for (int64_t block = begin; block < end; ++block) {
    const int32_t* table = p.neighbours + block * n * n;
    for (int row = -p.top; row < p.rows - p.top; ++row) {
      for (int column = -p.left; column < p.columns - p.left; ++column, y += channels) {
        const Place at = place(row, column, p.side, p.radius);
        const int64_t from = table[at.neighbour];
        if (from < 0) {
          std::fill_n(y, channels, fill);
          continue;
        }
        const E* x = static_cast<const E*>(p.from) + (from * positions + at.rank) * channels;
        std::memcpy(y, x, channels * sizeof(E));
      }
    }
  }
}

}  // namespace

void gather_windows(const GatherWindowsParams& p, int64_t begin, int64_t end) {
  switch (size_of(p.dtype)) {
    case 2: return gather<uint16_t>(p, begin, end);
    case 4: return gather<uint32_t>(p, begin, end);
    case 8: return gather<uint64_t>(p, begin, end);
  }
}

}  // namespace convmae::cpu
