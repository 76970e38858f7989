// What the depthwise convolution and its weight gradient share. A block is done in strips of up to
// four positions of a row. Whether a strip sees a piece of a row is asked once for all channels;
// what it sees is then added vector by vector, in loops without branches whose turns do not wait
// for each other. Features are read where they lie, whole rows of channels at a time: memory is
// slow at anything else. In an anonymous namespace for the reason given in vec.h.
#pragma once

#include "cpu/vec.h"
#include "masked_conv2d.h"

namespace convmae {
namespace {

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

}  // namespace
}  // namespace convmae
