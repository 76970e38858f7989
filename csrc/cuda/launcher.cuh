// Launches kernels on a stream and keeps the first error; asks how many a device holds.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

#include "launch.h"

namespace convmae::cuda {

// How many thread blocks of a kernel the current device holds at a time; 0: it cannot run it. Each
// kernel is asked for once on each device. The question loads the kernel, which is not allowed in
// the stricter modes in which a stream can be captured, so the mode is relaxed meanwhile.
inline int64_t blocks_held(const void* kernel, dim3 block, size_t shared_bytes) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, int64_t> known;
  int device = 0, multiprocessors = 0, blocks = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find({device, kernel});
  if (found != known.end()) return found->second;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  const int threads = int(block.x * block.y * block.z);
  cudaError_t code = cudaSuccess;
  if (shared_bytes > 48 << 10) {  // more than a kernel gets without asking
    code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                int(shared_bytes));
  }
  if (code == cudaSuccess) {
    code = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes);
  }
  if (code == cudaSuccess) {
    code = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  cudaThreadExchangeStreamCaptureMode(&mode);
  if (code != cudaSuccess) {
    cudaGetLastError();  // the launch will fail too, and say why
    return 0;
  }
  return known[{device, kernel}] = int64_t(multiprocessors) * blocks;
}

struct Launcher {
  const char* name;  // of the op, for messages
  Stream stream;
  LaunchError error = {};

  template <class... Params, class... Args>
  void operator()(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                  const Args&... args) {
    if (error.code != 0) return;
    blocks_held(reinterpret_cast<const void*>(kernel), block, shared_bytes);  // loads the kernel
    kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
    const cudaError_t code = cudaGetLastError();
    if (code != cudaSuccess) error = {int(code), name};
  }
};

// Stands where a Launcher does, but launches nothing: how many thread blocks of the kernel the
// current device holds at a time.
struct BlocksHeld {
  int64_t count = 0;

  template <class... Params, class... Args>
  void operator()(void (*kernel)(Params...), dim3, dim3 block, size_t shared_bytes,
                  const Args&...) {
    count = blocks_held(reinterpret_cast<const void*>(kernel), block, shared_bytes);
  }
};

}  // namespace convmae::cuda
