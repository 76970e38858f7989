// Launches; the kernels are in masked_conv2d.cuh.
#include "cuda/launcher.cuh"
#include "cuda/masked_conv2d.cuh"

namespace convmae::cuda {

LaunchError masked_conv2d(const MaskedConv2dForward& p, Stream stream) {
  Launcher launcher{"masked_conv2d", stream};
  launch_masked_conv2d(p, launcher);
  return launcher.error;
}

int64_t masked_conv2d_warps(const MaskedConv2dForward& p) {
  BlocksHeld held;
  launch_masked_conv2d(p, held);
  return held.count;
}

}  // namespace convmae::cuda
