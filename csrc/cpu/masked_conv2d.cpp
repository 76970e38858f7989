// CPU kernels of the depthwise convolution; compiled once for each instruction set, CONVMAE_ISA.
//
// A block is done in strips of up to four positions of a row. Whether a strip sees a piece of a row
// is asked once for all channels; what it sees is then added vector by vector, in loops without
// branches whose turns do not wait for each other. Features are read where they lie, whole rows of
// channels at a time: memory is slow at anything else.
#include "masked_conv2d.h"

#include "cpu/vec.h"

namespace convmae {
namespace {

using cpu::MaskedConv2dForward;
using cpu::MaskedConv2dWeightGrad;

// Where every position of a block and its halo lies, in raster order; null where it is hidden.
template <class T>
class Window {
 public:
  explicit Window(const cpu::MaskedConv2dWindow& p)
      : p_(p), size_(int64_t(p.window_rows()) * p.window_columns()), at_(size_) {}

  void move_to(int64_t block) {
    const int32_t* rows = p_.neighbours + block * p_.table_columns;
    const T* x = static_cast<const T*>(p_.x);
    const int64_t positions = int64_t(p_.side) * p_.side;
    for (int64_t i = 0; i < size_; ++i) {
      const int64_t row = rows[p_.window[i].neighbour];
      at_.get()[i] = row < 0 ? nullptr : x + (row * positions + p_.window[i].rank) * p_.channels;
    }
  }

  // What the first tap of the block's position `i`, in raster order, meets.
  const T* const* from(int64_t i) const {
    return at_.get() + i / p_.side * p_.window_columns() + i % p_.side;
  }

 private:
  const cpu::MaskedConv2dWindow& p_;
  const int64_t size_;
  Buffer<const T*> at_;
};

// The offset of every position of a block, in raster order, in packed features.
class Offsets {
 public:
  explicit Offsets(const MaskedConv2dParams& p) : offsets_(int64_t(p.side) * p.side) {
    for (int i = 0; i < p.side * p.side; ++i) {
      offsets_.get()[i] = zorder(i / p.side, i % p.side) * p.channels;
    }
  }
  int64_t operator[](int64_t i) const { return offsets_.get()[i]; }

 private:
  Buffer<int64_t> offsets_;
};

// Asks for features that will be wanted a few blocks later, as many as one strip has.
template <class T>
inline void prefetch(const T* strip, int64_t elements) {
  constexpr int64_t ahead = 1 << 16, line = 64;  // bytes
  const uintptr_t from = reinterpret_cast<uintptr_t>(strip) + ahead;
  for (int64_t i = 0; i < elements * int64_t(sizeof(T)); i += line) {
    __builtin_prefetch(reinterpret_cast<const void*>(from + i), 0, 2);
  }
}

// The Strip + K - 1 positions that a strip reads of a row, in segments that lie in one block each:
// strips begin at multiples of their length. Segment S is [kBegin, kEnd); it meets the outputs
// [kFirstOutput, kLastOutput) and the taps [kFirstTap, kLastTap).
template <int K, int Strip>
constexpr int kSegments = 2 * ((K / 2 + Strip - 1) / Strip) + 1;

template <int K, int Strip, int S>
struct Segment {
  static constexpr int clamp(int x, int end) { return x < 0 ? 0 : x < end ? x : end; }
  static constexpr int kStart = K / 2 + (S - kSegments<K, Strip> / 2) * Strip;
  static constexpr int kBegin = clamp(kStart, Strip + K - 1);
  static constexpr int kEnd = clamp(kStart + Strip, Strip + K - 1);
  static constexpr int kFirstOutput = clamp(kBegin - K + 1, Strip),
                       kLastOutput = clamp(kEnd, Strip);
  static constexpr int kFirstTap = clamp(kBegin - Strip + 1, K), kLastTap = clamp(kEnd, K);
};

// Calls f(x, j, o) for the positions x of a segment, the taps j and the outputs o of the strip that
// meet, x = o + j, all of them constants.
template <int K, int Strip, int S, class F>
__attribute__((always_inline)) inline void for_meetings(F&& f) {
  using Seg = Segment<K, Strip, S>;
  unroll<Seg::kEnd, Seg::kBegin>([&](auto x) {
    unroll<Seg::kLastTap, Seg::kFirstTap>([&](auto j) {
      constexpr int o = decltype(x)::value - decltype(j)::value;
      if constexpr (o >= 0 && o < Strip) f(x, j, Index<o>{});
    });
  });
}

// Calls f(segment, kernel row, positions that the row reads) for what a strip sees; `x` is
// Window::from of its first position.
template <int K, int Strip, class T, class F>
inline void for_visible(int64_t window_columns, const T* const* x, F&& f) {
  for (int i = 0; i < K; ++i, x += window_columns) {
    unroll<kSegments<K, Strip>>([&](auto s) {
      if (x[Segment<K, Strip, decltype(s)::value>::kBegin] != nullptr) f(s, i, x);
    });
  }
}

// Calls f(tap, position) for what one output sees with a kernel of any shape.
template <class T, class F>
inline void for_visible_taps(const MaskedConv2dParams& p, const T* const* x, F&& f) {
  for (int i = 0; i < p.kernel_rows; ++i) {
    const T* const* row = x + int64_t(i) * p.dilation_rows * p.window_columns();
    for (int j = 0; j < p.kernel_columns; ++j) {
      const T* at = row[j * p.dilation_columns];
      if (at != nullptr) f(i * p.kernel_columns + j, at);
    }
  }
}

// sums += a * b, for a row of channels.
template <class T, class U>
inline void multiply_add(int64_t channels, const T* a, const U* b, Acc<T>* sums) {
  for_vectors<Acc<T>>(channels, [&](auto n, int64_t c) {
    store<n>(sums + c, load<n>(sums + c) + load<n>(a + c) * load<n>(b + c));
  });
}

// -- forward ----------------------------------------------------------------------------------

// Adds what one segment of a row gives to a strip: x[Strip + K - 1], taps [K][channels], sums
// [Strip][channels]. With First, which is for a segment that meets every output, the sums begin
// with `bias`.
template <class T, int K, int Strip, int S, bool First>
inline void convolve_segment(int64_t channels, const T* const* x, const Acc<T>* taps,
                             const Acc<T>* bias, Acc<T>* sums) {
  using Seg = Segment<K, Strip, S>;
  const T* at[Strip + K - 1];
  unroll<Seg::kEnd, Seg::kBegin>([&](auto i) { at[i] = x[i]; });
  for_vectors<Acc<T>>(channels, [&](auto n, int64_t c) {
    Vec<Acc<T>, n> sum[Strip], value[Strip + K - 1];
    unroll<Seg::kLastOutput, Seg::kFirstOutput>(
        [&](auto o) { sum[o] = load<n>(First ? bias + c : sums + o * channels + c); });
    unroll<Seg::kEnd, Seg::kBegin>([&](auto i) { value[i] = load<n>(at[i] + c); });
    for_meetings<K, Strip, S>(
        [&](auto i, auto j, auto o) { sum[o] += value[i] * load<n>(taps + j * channels + c); });
    unroll<Seg::kLastOutput, Seg::kFirstOutput>(
        [&](auto o) { store<n>(sums + o * channels + c, sum[o]); });
  });
}

// K is the side of a square kernel of dilation 1, or 0 for any kernel (then Strip is 1).
template <class T, int K, int Strip>
void forward_blocks(const MaskedConv2dForward& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t positions = int64_t(p.side) * p.side, channels = p.channels;
  const A *const bias = static_cast<const A*>(p.weight), *const taps = bias + channels;
  Window<T> window(p);
  const Offsets offsets(p);
  Buffer<A> sums(Strip * channels);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t start = block * positions * channels;
    window.move_to(block);
    const T* const x = static_cast<const T*>(p.x) + start;
    T* const y = static_cast<T*>(p.y) + start;
    for (int64_t i = 0; i < positions; i += Strip) {
      prefetch(x + i * channels, Strip * channels);
      const T* const* from = window.from(i);
      if constexpr (K > 0) {
        constexpr int own = kSegments<K, Strip> / 2;  // the strip itself, which is visible
        convolve_segment<T, K, Strip, own, true>(channels, from + K / 2 * p.window_columns(),
                                                 taps + K / 2 * K * channels, bias, sums.get());
        for_visible<K, Strip>(p.window_columns(), from, [&](auto s, int row, auto at) {
          if (s == own && row == K / 2) return;
          convolve_segment<T, K, Strip, decltype(s)::value, false>(
              channels, at, taps + row * K * channels, bias, sums.get());
        });
      } else {
        std::memcpy(sums.get(), bias, channels * sizeof(A));
        for_visible_taps(p, from, [&](int64_t tap, const T* x) {
          multiply_add(channels, x, taps + tap * channels, sums.get());
        });
      }
      for (int o = 0; o < Strip; ++o) {
        const A* sum = sums.get() + o * channels;
        T* to = y + offsets[i + o];
        for_vectors<A>(channels, [&](auto n, int64_t c) { store<n>(to + c, load<n>(sum + c)); });
      }
    }
  }
}

// -- weight gradient --------------------------------------------------------------------------

// Adds what one segment of a row gives to the gradients of a kernel row: x[Strip + K - 1],
// grad[Strip], sums [K][channels].
template <class T, int K, int Strip, int S>
inline void correlate_segment(int64_t channels, const T* const* x, const T* const* grad,
                              Acc<T>* sums) {
  using Seg = Segment<K, Strip, S>;
  const T *at[Strip + K - 1], *g[Strip];
  unroll<Seg::kEnd, Seg::kBegin>([&](auto i) { at[i] = x[i]; });
  unroll<Seg::kLastOutput, Seg::kFirstOutput>([&](auto o) { g[o] = grad[o]; });
  for_vectors<Acc<T>>(channels, [&](auto n, int64_t c) {
    Vec<Acc<T>, n> sum[K], weight[Strip], value[Strip + K - 1];
    // From zero, as each addition to a long sum rounds anew.
    unroll<Seg::kLastTap, Seg::kFirstTap>([&](auto j) { sum[j] = Vec<Acc<T>, n>{}; });
    unroll<Seg::kLastOutput, Seg::kFirstOutput>([&](auto o) { weight[o] = load<n>(g[o] + c); });
    unroll<Seg::kEnd, Seg::kBegin>([&](auto i) { value[i] = load<n>(at[i] + c); });
    for_meetings<K, Strip, S>([&](auto i, auto j, auto o) { sum[j] += value[i] * weight[o]; });
    unroll<Seg::kLastTap, Seg::kFirstTap>([&](auto j) {
      store<n>(sums + j * channels + c, load<n>(sums + j * channels + c) + sum[j]);
    });
  });
}

// `partial` is [1 + taps][channels]: the bias, the taps.
template <class T, int K, int Strip>
void weight_grad_blocks(const MaskedConv2dWeightGrad& p, void* partial, int64_t begin,
                        int64_t end) {
  using A = Acc<T>;
  const int64_t positions = int64_t(p.side) * p.side, channels = p.channels;
  A *const bias = static_cast<A*>(partial), *const taps = bias + channels;
  std::memset(bias, 0, (1 + int64_t(p.kernel_rows) * p.kernel_columns) * channels * sizeof(A));
  Window<T> window(p);
  const Offsets offsets(p);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t start = block * positions * channels;
    window.move_to(block);
    const T* const x = static_cast<const T*>(p.x) + start;
    const T* const first = static_cast<const T*>(p.grad) + start;
    for (int64_t i = 0; i < positions; i += Strip) {
      prefetch(x + i * channels, Strip * channels);
      prefetch(first + i * channels, Strip * channels);
      const T* grad[Strip];
      unroll<Strip>([&](auto o) { grad[o] = first + offsets[i + o]; });
      for_vectors<A>(channels, [&](auto n, int64_t c) {
        auto sum = load<n>(bias + c);
        unroll<Strip>([&](auto o) { sum += load<n>(grad[o] + c); });
        store<n>(bias + c, sum);
      });
      if constexpr (K > 0) {
        for_visible<K, Strip>(p.window_columns(), window.from(i), [&](auto s, int row, auto x) {
          correlate_segment<T, K, Strip, decltype(s)::value>(channels, x, grad,
                                                             taps + row * K * channels);
        });
      } else {
        for_visible_taps(p, window.from(i), [&](int64_t tap, const T* x) {
          multiply_add(channels, x, grad[0], taps + tap * channels);
        });
      }
    }
  }
}

// -- the choice of a kernel -------------------------------------------------------------------

// f(kernel side or 0, strip), as constants: the kernels that networks use, where a position that is
// read serves several outputs; any other shape, and double, take the kernel for any shape.
template <class T, class F>
void with_shape(const MaskedConv2dParams& p, F&& f) {
  const auto with_kernel = [&](auto strip) {
    if constexpr (!std::is_same_v<T, double>) {
      if (p.kernel_rows == p.kernel_columns && p.dilation_rows == 1 && p.dilation_columns == 1) {
        switch (p.kernel_rows) {
          case 3: return f(Index<3>{}, strip);
          case 5: return f(Index<5>{}, strip);
          case 7: return f(Index<7>{}, strip);
        }
      }
    }
    f(Index<0>{}, Index<1>{});
  };
  if (p.side >= 4) return with_kernel(Index<4>{});
  if (p.side == 2) return with_kernel(Index<2>{});
  f(Index<0>{}, Index<1>{});
}

void forward(const MaskedConv2dForward& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto type) {
    with_shape<decltype(type)>(p, [&](auto kernel, auto strip) {
      forward_blocks<decltype(type), decltype(kernel)::value, decltype(strip)::value>(p, begin,
                                                                                      end);
    });
  });
}

void weight_grad(const MaskedConv2dWeightGrad& p, void* partial, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto type) {
    with_shape<decltype(type)>(p, [&](auto kernel, auto strip) {
      weight_grad_blocks<decltype(type), decltype(kernel)::value, decltype(strip)::value>(
          p, partial, begin, end);
    });
  });
}

}  // namespace

namespace cpu::CONVMAE_ISA {
const MaskedConv2dKernels masked_conv2d = {forward, weight_grad};
}  // namespace cpu::CONVMAE_ISA
}  // namespace convmae
