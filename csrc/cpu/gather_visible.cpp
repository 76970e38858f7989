// CPU kernel: copies the visible blocks [begin, end) out of dense feature maps.
#include "gather_visible.h"

#include <cstring>

#include "block.h"

namespace convmae::cpu {
namespace {

// Elements are only moved, so their size is all that matters.
template <class E>
void gather(const GatherVisibleParams& p, int64_t begin, int64_t end) {
  const int64_t grid = p.grid_rows * p.grid_columns, area = int64_t(p.side) * p.side;
  int64_t across[32];  // from the first position of a row to the others
  for (int column = 0; column < p.side; ++column) across[column] = zorder(0, column) * p.channels;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t index = p.block_index[block], cell = index % grid;
    const E* corner = static_cast<const E*>(p.images) + index / grid * p.stride_batch +
                      cell / p.grid_columns * p.side * p.stride_row +
                      cell % p.grid_columns * p.side * p.stride_column;
    for (int row = 0; row < p.side; ++row) {
      const E* x = corner + row * p.stride_row;
      E* y = static_cast<E*>(p.y) + (block * area + zorder(row, 0)) * p.channels;
      if (p.stride_channel == 1) {
        for (int column = 0; column < p.side; ++column, x += p.stride_column) {
          std::memcpy(y + across[column], x, p.channels * sizeof(E));
        }
        continue;
      }
      for (int64_t c = 0; c < p.channels; ++c, ++y, x += p.stride_channel) {
        for (int column = 0; column < p.side; ++column) {
          y[across[column]] = x[column * p.stride_column];
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
