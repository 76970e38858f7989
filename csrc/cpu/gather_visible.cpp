// CPU kernel: copies the visible blocks [begin, end) out of dense feature maps.
#include "gather_visible.h"

#include <cstring>

#include "block.h"

namespace convmae::cpu {
namespace {

// Elements are only moved, so their size is all that matters.
template <class E>
void gather(const GatherVisibleParams& p, int64_t begin, int64_t end) {
  const int64_t positions = int64_t(p.side) * p.side;
  const int64_t grid = p.grid_rows * p.grid_columns;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t index = p.block_index[block], cell = index % grid;
    const E* corner = static_cast<const E*>(p.images) + index / grid * p.stride_batch +
                      cell / p.grid_columns * p.side * p.stride_row +
                      cell % p.grid_columns * p.side * p.stride_column;
    E* y = static_cast<E*>(p.y) + block * positions * p.channels;
    for (int row = 0; row < p.side; ++row) {
      const E* line = corner + row * p.stride_row;
      if (p.stride_channel == 1) {
        for (int column = 0; column < p.side; ++column) {
          std::memcpy(y + zorder(row, column) * p.channels, line + column * p.stride_column,
                      p.channels * sizeof(E));
        }
        continue;
      }
      int64_t place[32];
      for (int column = 0; column < p.side; ++column) {
        place[column] = zorder(row, column) * p.channels;
      }
      for (int64_t c = 0; c < p.channels; ++c, line += p.stride_channel) {
        for (int column = 0; column < p.side; ++column) {
          y[place[column] + c] = line[column * p.stride_column];
        }
      }
    }
  }
}

}  // namespace

void gather_visible(const GatherVisibleParams& p, int64_t begin, int64_t end) {
  switch (p.element_size) {
    case 2: return gather<uint16_t>(p, begin, end);
    case 4: return gather<uint32_t>(p, begin, end);
    case 8: return gather<uint64_t>(p, begin, end);
  }
}

}  // namespace convmae::cpu
