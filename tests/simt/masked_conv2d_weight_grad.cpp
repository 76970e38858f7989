#include "simt.h"
//
#include "cuda/masked_conv2d_weight_grad.cuh"
#include "kernels.h"

namespace simt {

void masked_conv2d_weight_grad(const convmae::cuda::MaskedConv2dWeightGrad& p, unsigned seed) {
#if defined(SIMT_REMOVED)
  launch(convmae::cuda::masked_conv2d_weight_grad_tiles<convmae::Half, 4, 5>,
         dim3(p.slices, p.runs), dim3(32, convmae::cuda::kReducingWarps<4, 5>), 0, seed, p);
  masked_conv2d_weight_grad_sum(p, seed);
#else
  convmae::cuda::launch_masked_conv2d_weight_grad(p, Launcher{seed});
#endif
}

void masked_conv2d_weight_grad_sum(const convmae::cuda::MaskedConv2dWeightGrad& p, unsigned seed) {
#if defined(SIMT_REMOVED)
  launch(convmae::cuda::masked_conv2d_weight_grad_sum<convmae::Half>,
         ((1 + p.kernel_rows * p.kernel_columns) * p.channels + 31) / 32, dim3(32, 8), 0, seed, p);
#else
  convmae::cuda::launch_masked_conv2d_weight_grad_sum(p, Launcher{seed});
#endif
}

}  // namespace simt
