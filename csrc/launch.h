// How launches of GPU kernels are asked for and answered, without the GPU's own headers.
#pragma once

namespace convmae::cuda {

using Stream = void*;  // a cudaStream_t

// A cudaError_t and the kernel that it came from; 0: launched.
struct LaunchError {
  int code = 0;
  const char* kernel = "";
};

}  // namespace convmae::cuda
