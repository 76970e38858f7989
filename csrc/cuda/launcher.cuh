// Launches kernels on a stream and keeps the first error.
#pragma once

#include "launch.h"

namespace convmae::cuda {

struct Launcher {
  const char* name;  // of the op, for messages
  Stream stream;
  LaunchError error = {};

  template <class... Params, class... Args>
  void operator()(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                  const Args&... args) {
    if (error.code != 0) return;
    kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
    const cudaError_t code = cudaGetLastError();
    if (code != cudaSuccess) error = {int(code), name};
  }
};

}  // namespace convmae::cuda
