// CPU kernels of the depthwise convolution; compiled once for each instruction set, CONVMAE_ISA.
//
// A block is worked on a few channels at a time, one step of for_channels. The visible positions of
// the block and its halo are first copied, in the accumulation type, to a small tile: the features
// lie a power of two apart, so that in place they would push each other out of the cache. Then the
// block is done in strips of up to four positions of a row. A position that is read serves every
// output of the strip that it reaches, from registers; a hidden one costs a branch.
#include "masked_conv2d.h"

#include <cstdlib>
#include <new>

#include "cpu/vec.h"

namespace convmae {
namespace {

using cpu::MaskedConv2dForward;
using cpu::MaskedConv2dWeightGrad;

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<T*>(std::calloc(size > 0 ? size : 1, sizeof(T)))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

// Moves the channels of one step to or from the accumulation type.
template <class T, class S, class To>
inline void copy_position(S, const T* from, To* to) {
  unroll<S::kVectors>(
      [&](auto v) { store<S::kWidth>(to + v * S::kWidth, load<S::kWidth>(from + v * S::kWidth)); });
}

// The features of every position of a block and its halo, in raster order.
template <class T>
class Window {
 public:
  explicit Window(const cpu::MaskedConv2dWindow& p)
      : p_(p), size_(int64_t(p.window_rows()) * p.window_columns()), visible_(size_), at_(size_) {}

  void move_to(int64_t block) {
    const int32_t* rows = p_.neighbours + block * p_.table_columns;
    const T* x = static_cast<const T*>(p_.x);
    const int64_t positions = int64_t(p_.side) * p_.side;
    count_ = 0;
    for (int64_t i = 0; i < size_; ++i) {
      const int64_t row = rows[p_.window[i].neighbour];
      visible_.get()[i] = row >= 0;
      if (row < 0) continue;
      at_.get()[count_++] = {i, x + (row * positions + p_.window[i].rank) * p_.channels};
    }
  }

  // Copies the channels of one step to tile [size][S::kChannels], and asks for those of the next;
  // hidden positions are left alone.
  template <class S>
  void copy(S, int64_t c, Acc<T>* tile) const {
    for (const Position *at = at_.get(), *end = at + count_; at < end; ++at) {
      __builtin_prefetch(at->x + c + S::kChannels);
      copy_position<T>(S{}, at->x + c, tile + at->place * S::kChannels);
    }
  }

  const bool* visible() const { return visible_.get(); }
  int64_t size() const { return size_; }

 private:
  struct Position {
    int64_t place;  // in the window
    const T* x;
  };

  const cpu::MaskedConv2dWindow& p_;
  const int64_t size_;
  int64_t count_ = 0;
  Buffer<bool> visible_;
  Buffer<Position> at_;  // the visible ones
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

// The most channels of a step.
template <class A, int Vectors>
constexpr int kMaxChannels = kLanes<A> * Vectors;

// Calls f(row, column) for the first position of every strip of a block.
template <int Strip, class F>
inline void for_strips(int side, F&& f) {
  for (int row = 0; row < side; ++row) {
    for (int column = 0; column < side; column += Strip) f(row, column);
  }
}

// Calls f(Index<x>) for the visible ones of the Strip + K - 1 positions that a strip reads of a
// row. Strips begin at multiples of their length, so the strip itself is in one block, and what
// lies before and after it is in one block each where that is no longer than a strip: one test for
// each.
template <int K, int Strip, class F>
__attribute__((always_inline)) inline void for_visible(const bool* visible, F&& f) {
  constexpr int halo = K / 2;
  if constexpr (halo <= Strip) {
    if (visible[0]) unroll<halo>(f);
    if (visible[halo]) unroll<halo + Strip, halo>(f);
    if (visible[halo + Strip]) unroll<Strip + K - 1, halo + Strip>(f);
  } else {
    unroll<Strip + K - 1>([&](auto x) {
      if (visible[x]) f(x);
    });
  }
}

// The last channels, one by one, take the kernel for any shape: less to compile.
template <class S>
constexpr int kernel_for(int kernel) {
  return S::kWidth == 1 ? 0 : kernel;
}

// -- forward ----------------------------------------------------------------------------------

// One strip, the channels of one step. K is the side of a square kernel of dilation 1, or 0 for any
// kernel. `visible` and `tile` point at the first tap of the strip's first output; `weight` holds
// the bias and then the taps, [1 + taps][S::kChannels]; outputs are `out_stride` apart.
template <class A, int K, int Strip, class S>
inline void convolve_strip(const MaskedConv2dForward& p, S, const bool* visible, const A* tile,
                           const A* weight, A* out, int64_t out_stride) {
  using V = Vec<A, S::kWidth>;
  constexpr int n = S::kWidth, channels = S::kChannels;
  const int64_t width = p.window_columns();

  V sum[Strip][S::kVectors];
  unroll<S::kVectors>([&](auto v) {
    const V bias = load<n>(weight + v * n);
    unroll<Strip>([&](auto o) { sum[o][v] = bias; });
  });
  weight += channels;
  if constexpr (K > 0) {
    for (int i = 0; i < K; ++i) {
      for_visible<K, Strip>(visible, [&](auto x) {
        V value[S::kVectors];
        unroll<S::kVectors>([&](auto v) { value[v] = load<n>(tile + x * channels + v * n); });
        unroll<K>([&](auto j) {
          constexpr int o = decltype(x)::value - decltype(j)::value;
          if constexpr (o >= 0 && o < Strip) {
            unroll<S::kVectors>(
                [&](auto v) { sum[o][v] += value[v] * load<n>(weight + j * channels + v * n); });
          }
        });
      });
      visible += width;
      tile += width * channels;
      weight += K * channels;
    }
  } else {
    for (int i = 0; i < p.kernel_rows; ++i) {
      for (int j = 0; j < p.kernel_columns; ++j, weight += channels) {
        const int64_t first = i * p.dilation_rows * width + j * p.dilation_columns;
        V tap[S::kVectors];
        unroll<S::kVectors>([&](auto v) { tap[v] = load<n>(weight + v * n); });
        unroll<Strip>([&](auto o) {
          if (!visible[first + o]) return;
          const A* x = tile + (first + o) * channels;
          unroll<S::kVectors>([&](auto v) { sum[o][v] += load<n>(x + v * n) * tap[v]; });
        });
      }
    }
  }
  unroll<Strip>([&](auto o) {
    unroll<S::kVectors>([&](auto v) { store<n>(out + o * out_stride + v * n, sum[o][v]); });
  });
}

template <class T, int K, int Strip>
void forward_blocks(const MaskedConv2dForward& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  constexpr int vectors = Strip == 4 ? 2 : 4;
  const int64_t width = p.window_columns(), positions = int64_t(p.side) * p.side;
  const int64_t rows = 1 + int64_t(p.kernel_rows) * p.kernel_columns;  // the bias, the taps
  Buffer<A> weight(rows * (p.channels + kLanes<A>));  // [rows][channels of the step] of each step
  for_channels<A, vectors>(p.channels, [&](auto step, int64_t c, int64_t column) {
    for (int64_t row = 0; row < rows; ++row) {
      copy_position<A>(step, static_cast<const A*>(p.weight) + row * p.channels + c,
                       weight.get() + rows * column + row * step.kChannels);
    }
  });
  Window<T> window(p);
  const Offsets offsets(p);
  Buffer<A> tile(window.size() * kMaxChannels<A, vectors>);
  // Outputs are written a whole block at a time, for the same reason as inputs are copied.
  const int64_t done_stride = p.channels + 2 * kLanes<A>;
  Buffer<A> done(positions * done_stride);
  for (int64_t block = begin; block < end; ++block) {
    window.move_to(block);
    for_channels<A, vectors>(p.channels, [&](auto step, int64_t c, int64_t column) {
      using S = decltype(step);
      window.copy(step, c, tile.get());
      for_strips<Strip>(p.side, [&](int row, int at) {
        const int64_t first = row * width + at;
        convolve_strip<A, kernel_for<S>(K), Strip>(
            p, step, window.visible() + first, tile.get() + first * S::kChannels,
            weight.get() + rows * column, done.get() + (row * p.side + at) * done_stride + c,
            done_stride);
      });
    });
    T* const y = static_cast<T*>(p.y) + block * positions * p.channels;
    for (int64_t i = 0; i < positions; ++i) {
      for_channels<A, vectors>(p.channels, [&](auto step, int64_t c, int64_t) {
        copy_position<A>(step, done.get() + i * done_stride + c, y + offsets[i] + c);
      });
    }
  }
}

// -- weight gradient --------------------------------------------------------------------------

template <int N, class A>
inline void add(A* sums, Vec<A, N> x) {
  store<N>(sums, load<N>(sums) + x);
}

// Adds one block's share of the gradients to `sums`, [1 + taps][S::kChannels]: the bias, the taps.
// `grad` is [side * side][S::kChannels] in raster order.
template <class A, int K, int Strip, class S>
inline void correlate_block(const MaskedConv2dWeightGrad& p, S, const bool* visible, const A* tile,
                            const A* grad, A* sums) {
  using V = Vec<A, S::kWidth>;
  constexpr int n = S::kWidth, channels = S::kChannels;
  const int64_t width = p.window_columns();
  V bias[S::kVectors] = {};
  for (int i = 0; i < p.side * p.side; ++i) {
    unroll<S::kVectors>([&](auto v) { bias[v] += load<n>(grad + i * channels + v * n); });
  }
  unroll<S::kVectors>([&](auto v) { add<n>(sums + v * n, bias[v]); });
  sums += channels;
  if constexpr (K > 0) {
    for (int i = 0; i < K; ++i, sums += K * channels) {
      V sum[K][S::kVectors] = {};
      for_strips<Strip>(p.side, [&](int row, int column) {
        const A* g = grad + (row * p.side + column) * channels;
        const int64_t first = (row + i) * width + column;
        for_visible<K, Strip>(visible + first, [&](auto x) {
          V value[S::kVectors];
          unroll<S::kVectors>(
              [&](auto v) { value[v] = load<n>(tile + (first + x) * channels + v * n); });
          unroll<K>([&](auto j) {
            constexpr int o = decltype(x)::value - decltype(j)::value;
            if constexpr (o >= 0 && o < Strip) {
              unroll<S::kVectors>(
                  [&](auto v) { sum[j][v] += value[v] * load<n>(g + o * channels + v * n); });
            }
          });
        });
      });
      unroll<K>([&](auto j) {
        unroll<S::kVectors>([&](auto v) { add<n>(sums + j * channels + v * n, sum[j][v]); });
      });
    }
  } else {
    for (int i = 0; i < p.kernel_rows; ++i) {
      for (int j = 0; j < p.kernel_columns; ++j, sums += channels) {
        V sum[S::kVectors] = {};
        for_strips<1>(p.side, [&](int row, int column) {
          const int64_t x = (row + i * p.dilation_rows) * width + column + j * p.dilation_columns;
          if (!visible[x]) return;
          const A* g = grad + (row * p.side + column) * channels;
          unroll<S::kVectors>(
              [&](auto v) { sum[v] += load<n>(tile + x * channels + v * n) * load<n>(g + v * n); });
        });
        unroll<S::kVectors>([&](auto v) { add<n>(sums + v * n, sum[v]); });
      }
    }
  }
}

template <class T, int K, int Strip>
void weight_grad_blocks(const MaskedConv2dWeightGrad& p, void* partial, int64_t begin,
                        int64_t end) {
  using A = Acc<T>;
  constexpr int vectors = K == 7 ? 1 : 2;
  const int64_t positions = int64_t(p.side) * p.side;
  const int64_t rows = 1 + int64_t(p.kernel_rows) * p.kernel_columns;  // the bias, the taps
  Window<T> window(p);
  const Offsets offsets(p);
  Buffer<A> tile(window.size() * kMaxChannels<A, vectors>);
  Buffer<A> grad(positions * kMaxChannels<A, vectors>);
  Buffer<A> sums(rows * (p.channels + kLanes<A>));  // [rows][channels of the step] of each step
  for (int64_t block = begin; block < end; ++block) {
    window.move_to(block);
    const T* g = static_cast<const T*>(p.grad) + block * positions * p.channels;
    for_channels<A, vectors>(p.channels, [&](auto step, int64_t c, int64_t column) {
      using S = decltype(step);
      window.copy(step, c, tile.get());
      for (int64_t i = 0; i < positions; ++i) {
        __builtin_prefetch(g + offsets[i] + c + S::kChannels);
        copy_position<T>(step, g + offsets[i] + c, grad.get() + i * S::kChannels);
      }
      correlate_block<A, kernel_for<S>(K), Strip>(p, step, window.visible(), tile.get(), grad.get(),
                                                  sums.get() + rows * column);
    });
  }
  for_channels<A, vectors>(p.channels, [&](auto step, int64_t c, int64_t column) {
    for (int64_t row = 0; row < rows; ++row) {
      copy_position<A>(step, sums.get() + rows * column + row * step.kChannels,
                       static_cast<A*>(partial) + row * p.channels + c);
    }
  });
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
    f(Index<0>{}, strip);
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
