// Launches; the kernels are in masked_conv2d_grads.cuh.
#include "cuda/launcher.cuh"
#include "cuda/masked_conv2d_grads.cuh"

namespace convmae::cuda {

LaunchError masked_conv2d_grads(const MaskedConv2dGrads& p, Stream stream) {
  Launcher launcher{"masked_conv2d_grads", stream};
  launch_masked_conv2d_grads(p, launcher);
  return launcher.error.code != 0 ? launcher.error : masked_conv2d_weight_grad_sum(p, stream);
}

}  // namespace convmae::cuda
