// CPU kernel: the gradients of the blocks [begin, end), each the sum, in the order of the neighbour
// table, of the windows that hold it; compiled once for each instruction set, CONVMAE_ISA.
#include "block.h"
#include "cpu/vec.h"
#include "gather_windows.h"

namespace convmae {
namespace {

// Adds what the window of one neighbour holds of a block to the block's sums,
// [positions][channels]; `row` and `column` are those of the neighbour, from the block.
template <class T>
void add_window(const GatherWindowsParams& p, const T* window, int row, int column, Acc<T>* sums) {
  const int top = row * p.side - p.top, left = column * p.side - p.left;
  for (int i = top > 0 ? top : 0; i < p.side && i < top + p.rows; ++i) {
    for (int j = left > 0 ? left : 0; j < p.side && j < left + p.columns; ++j) {
      const T* x = window + (int64_t(i - top) * p.columns + j - left) * p.channels;
      Acc<T>* sum = sums + zorder(i, j) * p.channels;
      for_vectors<Acc<T>>(p.channels, [&](auto n, int64_t c) {
        store<n>(sum + c, load<n>(sum + c) + load<n>(x + c));
      });
    }
  }
}

template <class T>
void add_windows(const GatherWindowsParams& p, int64_t begin, int64_t end) {
  const int n = 2 * p.radius + 1;
  const int64_t size = int64_t(p.side) * p.side * p.channels;
  const int64_t window = int64_t(p.rows) * p.columns * p.channels;
  const Buffer<Acc<T>> sums(size);
  for (int64_t block = begin; block < end; ++block) {
    const int32_t* table = p.neighbours + block * n * n;
    std::memset(sums.get(), 0, size * sizeof(Acc<T>));
    for (int k = 0; k < n * n; ++k) {
      if (table[k] < 0) continue;
      add_window(p, static_cast<const T*>(p.from) + table[k] * window, k / n - p.radius,
                 k % n - p.radius, sums.get());
    }
    T* y = static_cast<T*>(p.to) + block * size;
    for_vectors<Acc<T>>(size, [&](auto m, int64_t i) { store<m>(y + i, load<m>(sums.get() + i)); });
  }
}

}  // namespace

namespace cpu {
template <>
void gather_windows_grad<Isa::CONVMAE_ISA>(const GatherWindowsParams& p, int64_t begin,
                                           int64_t end) {
  with_type(p.dtype, [&](auto type) { add_windows<decltype(type)>(p, begin, end); });
}
}  // namespace cpu
}  // namespace convmae
