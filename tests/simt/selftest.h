// Launches of the emulator's own kernels.
#pragma once

#include <string>

#include "scheduler.h"

namespace simt_test {

void launch(const std::string& name, dim3 grid, dim3 block, size_t shared, unsigned seed,
            const void* x, void* out, int n);

}  // namespace simt_test
