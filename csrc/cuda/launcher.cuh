// Launches kernels on a stream and keeps the first error.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

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

// How many thread blocks of a kernel the current device holds at a time; 0: it cannot run it. The
// calls are allowed while a stream is captured; each kernel is asked for once on each device.
inline int64_t blocks_held(const void* kernel, int threads, size_t shared_bytes) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, int64_t> known;
  int device = 0, multiprocessors = 0, blocks = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find({device, kernel});
  if (found != known.end()) return found->second;
  const bool answered = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount,
                                               device) == cudaSuccess &&
                        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads,
                                                                      shared_bytes) == cudaSuccess;
  if (!answered) {
    cudaGetLastError();  // the launch will fail too, and say why
    return 0;
  }
  return known[{device, kernel}] = int64_t(multiprocessors) * blocks;
}

// Stands where a Launcher does, but launches nothing: how many thread blocks of the kernel the
// current device holds at a time.
struct BlocksHeld {
  int64_t count = 0;

  template <class... Params, class... Args>
  void operator()(void (*kernel)(Params...), dim3, dim3 block, size_t shared_bytes,
                  const Args&...) {
    const int threads = int(block.x * block.y * block.z);
    count = blocks_held(reinterpret_cast<const void*>(kernel), threads, shared_bytes);
  }
};

}  // namespace convmae::cuda
