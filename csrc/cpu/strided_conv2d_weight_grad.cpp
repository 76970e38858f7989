// CPU kernel: the share of the blocks [begin, end) of the gradients of a depthwise convolution with
// a stride in weight and bias; compiled once for each instruction set, CONVMAE_ISA.
#include "cpu/products.h"
#include "strided_conv2d.h"

namespace convmae {
namespace {

// Blocks are taken together until so many outputs are: a piece of their channels stays in the
// nearest cache while every tap goes over it.
constexpr int64_t kOutputs = 32;

// sum += all rows, added up first.
template <class T>
inline void add_rows(int64_t channels, int64_t count, const T* rows, Acc<T>* sum) {
  for_vectors<Acc<T>>(channels, [&](auto n, int64_t c) {
    Vec<Acc<T>, n> total = {};
    for (int64_t i = 0; i < count; ++i) total += load<n>(rows + i * channels + c);
    store<n>(sum + c, load<n>(sum + c) + total);
  });
}

template <class T>
void weight_grad_blocks(const cpu::StridedConv2dWeightGrad& p, Acc<T>* partial, int64_t begin,
                        int64_t end) {
  const int64_t together = p.positions < kOutputs ? kOutputs / p.positions : 1;
  const int64_t capacity = together * p.positions, taps = p.taps(), channels = p.channels;
  Buffer<const T*> x(taps * capacity), grad(taps * capacity);  // that meet, for every tap
  Buffer<int64_t> counts(taps);
  for (int64_t first = begin; first < end; first += together) {
    const int64_t last = first + together < end ? first + together : end;
    std::memset(counts.get(), 0, taps * sizeof(int64_t));
    const T* const rows = static_cast<const T*>(p.grad) + first * p.positions * channels;
    const T* row = rows;
    for (int64_t block = first; block < last; ++block) {
      for (int64_t rank = 0; rank < p.positions; ++rank, row += channels) {
        for_met<T>(p, block, rank, [&](int64_t tap, const T* met) {
          const int64_t at = tap * capacity + counts.get()[tap]++;
          x.get()[at] = met;
          grad.get()[at] = row;
        });
      }
    }
    add_rows(channels, (last - first) * p.positions, rows, partial);
    for_pieces<Acc<T>>(channels, [&](auto vectors, auto lanes, int64_t c) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        Acc<T>* const sum = partial + (1 + tap) * channels;
        const int64_t at = tap * capacity;
        add_products<true, vectors, lanes>(c, counts.get()[tap], x.get() + at, grad.get() + at, sum,
                                           sum);
      }
    });
  }
}

}  // namespace

namespace cpu {
template <>
void strided_conv2d_weight_grad<Isa::CONVMAE_ISA>(const StridedConv2dWeightGrad& p, void* partial,
                                                  int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    weight_grad_blocks<T>(p, static_cast<Acc<T>*>(partial), begin, end);
  });
}
}  // namespace cpu
}  // namespace convmae
