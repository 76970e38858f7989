// Launches of the emulator's own kernels, by name.
#include "selftest.h"

#include <stdexcept>

#include "selftest.cuh"

namespace simt_test {

#define LAUNCH(kernel, ...)                                              \
  if (name == #kernel) {                                                 \
    return simt::launch(kernel, grid, block, shared, seed, __VA_ARGS__); \
  }

void launch(const std::string& name, dim3 grid, dim3 block, size_t shared, unsigned seed,
            const void* x, void* out, int n) {
  const int* const ints = static_cast<const int*>(x);
  const float* const floats = static_cast<const float*>(x);
  int* const int_out = static_cast<int*>(out);
  float* const float_out = static_cast<float*>(out);
  LAUNCH(ids, int_out)
  LAUNCH(block_sum, floats, float_out)
  LAUNCH(reverse, floats, float_out)
  LAUNCH(reverse_copies, ints, int_out)
  LAUNCH(uninitialised, float_out)
  LAUNCH(warp_calls, ints, int_out, n)
  LAUNCH(half_warps, ints, int_out)
  LAUNCH(warp_exchange, ints, int_out)
  LAUNCH(counts, ints, int_out)
  LAUNCH(early_exit, int_out)
  LAUNCH(divergent_barrier, int_out)
  LAUNCH(barrier_against_shuffle, int_out)
  LAUNCH(mask_without_caller, int_out)
  LAUNCH(empty_mask, int_out)
  LAUNCH(shuffle_from_outside_the_mask, int_out)
  LAUNCH(past_the_output, int_out, n)
  LAUNCH(past_shared_memory, int_out)
  LAUNCH(past_dynamic_shared_memory, int_out)
  LAUNCH(misaligned_vector, int_out)
  LAUNCH(same_bytes, int_out)
  throw std::runtime_error("no kernel " + name);
}

}  // namespace simt_test
