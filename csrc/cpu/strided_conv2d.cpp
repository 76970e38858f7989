// CPU kernel: depthwise convolution with a stride of the blocks [begin, end), or its gradient in
// the input; compiled once for each instruction set, CONVMAE_ISA.
#include "strided_conv2d.h"

#include "cpu/products.h"

namespace convmae {
namespace {

template <class T>
void convolve_blocks(const cpu::StridedConv2dProducts& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const A *const bias = static_cast<const A*>(p.weight), *const taps = bias + p.channels;
  Buffer<const T*> met(p.taps());
  Buffer<const A*> weight(p.taps());
  T* to = static_cast<T*>(p.result) + begin * p.positions * p.channels;
  for (int64_t block = begin; block < end; ++block) {
    for (int64_t rank = 0; rank < p.positions; ++rank, to += p.channels) {
      int64_t count = 0;
      for_met<T>(p, block, rank, [&](int64_t tap, const T* x) {
        met.get()[count] = x;
        weight.get()[count++] = taps + tap * p.channels;
      });
      for_pieces<A>(p.channels, [&](auto vectors, auto lanes, int64_t c) {
        add_products<false, vectors, lanes>(c, count, met.get(), weight.get(), bias, to);
      });
    }
  }
}

}  // namespace

namespace cpu {
template <>
void strided_conv2d<Isa::CONVMAE_ISA>(const StridedConv2dProducts& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto type) { convolve_blocks<decltype(type)>(p, begin, end); });
}
}  // namespace cpu
}  // namespace convmae
