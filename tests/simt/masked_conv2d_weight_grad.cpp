#include "simt.h"
//
#include "cuda/masked_conv2d_weight_grad.cuh"
#include "kernels.h"

namespace simt {

void masked_conv2d_weight_grad(const convmae::cuda::MaskedConv2dWeightGrad& p, unsigned seed) {
  convmae::cuda::launch_masked_conv2d_weight_grad(p, Launcher{seed});
}

}  // namespace simt
