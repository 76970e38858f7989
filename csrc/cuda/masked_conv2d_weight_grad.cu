// Launches; the kernels are in masked_conv2d_weight_grad.cuh.
#include "cuda/launcher.cuh"
#include "cuda/masked_conv2d_weight_grad.cuh"

namespace convmae::cuda {

LaunchError masked_conv2d_weight_grad(const MaskedConv2dWeightGrad& p, Stream stream) {
  Launcher launcher{"masked_conv2d_weight_grad", stream};
  launch_masked_conv2d_weight_grad(p, launcher);
  return launcher.error;
}

LaunchError masked_conv2d_weight_grad_sum(const MaskedConv2dWeightGrad& p, Stream stream) {
  Launcher launcher{"masked_conv2d_weight_grad_sum", stream};
  launch_masked_conv2d_weight_grad_sum(p, launcher);
  return launcher.error;
}

}  // namespace convmae::cuda
