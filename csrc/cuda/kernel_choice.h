// Which kernel was measured to be the fastest for a shape, in place of the plan's own choice; on
// the host, no CUDA.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "masked_conv2d.h"

namespace convmae::cuda {

struct KernelChoice {
  std::string op;  // the registered one, "masked_conv2d"
  DType dtype;
  int side, kernel_rows, kernel_columns;  // of a kernel without dilation
  int64_t least_channels, most_channels;
  bool wide;           // whether the channels fill 16 bytes
  std::string kernel;  // its name

  bool covers(const char* of, const MaskedConv2dParams& p) const {
    return op == of && dtype == p.dtype && side == p.side && kernel_rows == p.kernel_rows &&
           kernel_columns == p.kernel_columns && p.dilation_rows == 1 && p.dilation_columns == 1 &&
           p.channels >= least_channels && p.channels <= most_channels &&
           wide == (p.channels * size_of(p.dtype) % 16 == 0);
  }
};

// The choices of the process. Ops of any thread ask while another one sets; nobody waits where
// there are none.
class KernelChoices {
 public:
  void clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    choices_.clear();
    empty_ = true;
  }
  void add(KernelChoice choice) {
    const std::lock_guard<std::mutex> lock(mutex_);
    choices_.push_back(std::move(choice));
    empty_ = false;
  }
  // The name of the kernel that was chosen; empty: none was.
  std::string find(const char* op, const MaskedConv2dParams& p) const {
    if (empty_) return {};
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = std::find_if(choices_.begin(), choices_.end(),
                                    [&](const KernelChoice& c) { return c.covers(op, p); });
    return found == choices_.end() ? std::string() : found->kernel;
  }

 private:
  mutable std::mutex mutex_;
  std::atomic<bool> empty_ = true;
  std::vector<KernelChoice> choices_;
};

inline KernelChoices& kernel_choices() {
  static KernelChoices choices;
  return choices;
}

}  // namespace convmae::cuda
