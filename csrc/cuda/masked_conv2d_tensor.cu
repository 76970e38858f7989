// Launches; the kernel is in masked_conv2d_tensor.cuh.
#include "cuda/launcher.cuh"
#include "cuda/masked_conv2d_tensor.cuh"

namespace convmae::cuda {

LaunchError masked_conv2d_tensor(const MaskedConv2dForward& p, Stream stream) {
  Launcher launcher{"masked_conv2d", stream};
  launch_masked_conv2d_tensor(p, launcher);
  return launcher.error;
}

int64_t masked_conv2d_tensor_blocks(const MaskedConv2dForward& p) {
  // Code for older GPUs has no such instruction, and may run on newer ones.
  if (CONVMAE_LEAST_CUDA_ARCH < 80) return 0;
  BlocksHeld held;
  launch_masked_conv2d_tensor(p, held);
  return held.count;
}

}  // namespace convmae::cuda
