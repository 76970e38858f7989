// Launches; the kernels are in strided_conv2d.cuh.
#include "cuda/launcher.cuh"
#include "cuda/strided_conv2d.cuh"

namespace convmae::cuda {

LaunchError strided_conv2d(const StridedConv2dProducts& p, Stream stream) {
  Launcher launcher{"strided_conv2d", stream};
  launch_strided_conv2d(p, launcher);
  return launcher.error;
}

LaunchError strided_conv2d_weight_grad(const StridedConv2dWeightGrad& p, Stream stream) {
  Launcher launcher{"strided_conv2d_weight_grad", stream};
  launch_strided_conv2d_weight_grad(p, launcher);
  return launcher.error;
}

}  // namespace convmae::cuda
