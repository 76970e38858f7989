#include "simt.h"
//
#include "cuda/strided_conv2d.cuh"
#include "kernels.h"

namespace simt {

void strided_conv2d(const convmae::cuda::StridedConv2dProducts& p, unsigned seed) {
  convmae::cuda::launch_strided_conv2d(p, Launcher{seed});
}

void strided_conv2d_weight_grad(const convmae::cuda::StridedConv2dWeightGrad& p, unsigned seed) {
  convmae::cuda::launch_strided_conv2d_weight_grad(p, Launcher{seed});
}

}  // namespace simt
