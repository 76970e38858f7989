// CPU kernel: writes the blocks [begin, end) of dense feature maps, visible and hidden.
#include "scatter_visible.h"

#include <algorithm>
#include <cstring>

#include "block.h"

namespace convmae::cpu {
namespace {

template <class E>
void scatter(const ScatterVisibleParams& p, int64_t begin, int64_t end) {
  const int64_t positions = int64_t(p.side) * p.side;
  const int64_t grid = p.grid_rows * p.grid_columns, width = p.grid_columns * p.side;
  E fill;
  std::memcpy(&fill, p.fill, sizeof(E));
  for (int64_t block = begin; block < end; ++block) {
    const int64_t cell = block % grid;
    const int64_t line = (block / grid * p.grid_rows + cell / p.grid_columns) * p.side;
    E* corner = static_cast<E*>(p.y) + (line * width + cell % p.grid_columns * p.side) * p.channels;
    const int64_t from = p.row_of_block[block];
    const E* x = static_cast<const E*>(p.x) + from * positions * p.channels;
    for (int row = 0; row < p.side; ++row) {
      E* y = corner + row * width * p.channels;
      if (from < 0) {
        std::fill_n(y, p.side * p.channels, fill);
        continue;
      }
      for (int column = 0; column < p.side; ++column) {
        std::memcpy(y + column * p.channels, x + zorder(row, column) * p.channels,
                    p.channels * sizeof(E));
      }
    }
  }
}

}  // namespace

void scatter_visible(const ScatterVisibleParams& p, int64_t begin, int64_t end) {
  switch (p.element_size) {
    case 2: return scatter<uint16_t>(p, begin, end);
    case 4: return scatter<uint32_t>(p, begin, end);
    case 8: return scatter<uint64_t>(p, begin, end);
  }
}

}  // namespace convmae::cpu
