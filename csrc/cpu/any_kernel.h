// The depthwise convolution with a kernel of any shape, and for double: position by position, tap
// by tap, whole rows of channels at a time. In an anonymous namespace for the reason given in
// vec.h.
#pragma once

#include "cpu/vec.h"
#include "masked_conv2d.h"

namespace convmae {
namespace {

// Where every position of a block and its halo lies in `features`, in raster order; null where it
// is hidden.
template <class T>
class Window {
 public:
  Window(const cpu::MaskedConv2dWindow& p, const void* features)
      : p_(p),
        features_(static_cast<const T*>(features)),
        size_(int64_t(p.window_rows()) * p.window_columns()),
        at_(size_) {}

  void move_to(int64_t block) {
    const int32_t* rows = p_.neighbours + block * p_.table_columns;
    const int64_t positions = int64_t(p_.side) * p_.side;
    for (int64_t i = 0; i < size_; ++i) {
      const int64_t row = rows[p_.window[i].neighbour];
      at_.get()[i] =
          row < 0 ? nullptr : features_ + (row * positions + p_.window[i].rank) * p_.channels;
    }
  }

  // Calls f(tap, position) for what the block's position `row`, `column` sees.
  template <class F>
  void for_visible_taps(int row, int column, F&& f) const {
    for (int i = 0; i < p_.kernel_rows; ++i) {
      const T* const* seen =
          at_.get() + (row + int64_t(i) * p_.dilation_rows) * p_.window_columns() + column;
      for (int j = 0; j < p_.kernel_columns; ++j) {
        const T* at = seen[int64_t(j) * p_.dilation_columns];
        if (at != nullptr) f(i * p_.kernel_columns + j, at);
      }
    }
  }

 private:
  const cpu::MaskedConv2dWindow& p_;
  const T* const features_;
  const int64_t size_;
  Buffer<const T*> at_;
};

// A kernel's weights by tap, [taps][channels], from [channels][taps]. With `flipped` both axes of
// the kernel run the other way round.
template <class T>
inline void fill_tap_rows(const void* weight, int64_t channels, int64_t taps, bool flipped,
                          Acc<T>* rows) {
  const T* from = static_cast<const T*>(weight);
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      rows[(flipped ? taps - 1 - tap : tap) * channels + c] = to_acc(*from++);
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

// y = the sums, rounded.
template <class T>
inline void store_row(int64_t channels, const Acc<T>* sums, T* y) {
  for_vectors<Acc<T>>(channels, [&](auto n, int64_t c) { store<n>(y + c, load<n>(sums + c)); });
}

}  // namespace
}  // namespace convmae
