// CPU kernel: writes the lines of positions [begin, end) of dense feature maps, in order: hidden
// blocks too.
#include "scatter_visible.h"

#include <algorithm>
#include <cstring>

#include "block.h"

namespace convmae::cpu {
namespace {

template <class E>
void scatter(const ScatterVisibleParams& p, int64_t begin, int64_t end) {
  const int64_t area = int64_t(p.side) * p.side, strip = p.side * p.channels;
  E fill;
  std::memcpy(&fill, p.fill, sizeof(E));
  int64_t across[32];  // from the first position of a row to the others
  for (int column = 0; column < p.side; ++column) across[column] = zorder(0, column) * p.channels;
  E* y = static_cast<E*>(p.y) + begin * p.grid_columns * strip;
  for (int64_t line = begin; line < end; ++line) {
    const int64_t* from = p.row_of_block + line / p.side * p.grid_columns;
    const int64_t rank = zorder(int(line % p.side), 0);
    for (int64_t block = 0; block < p.grid_columns; ++block) {
      if (from[block] < 0) {
        std::fill_n(y, strip, fill);
        y += strip;
        continue;
      }
      const E* x = static_cast<const E*>(p.x) + (from[block] * area + rank) * p.channels;
      for (int column = 0; column < p.side; ++column, y += p.channels) {
        std::memcpy(y, x + across[column], p.channels * sizeof(E));
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
