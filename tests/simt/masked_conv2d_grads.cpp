#include "simt.h"
//
#include "cuda/masked_conv2d_grads.cuh"
#include "kernels.h"

namespace simt {

void masked_conv2d_grads(const convmae::cuda::MaskedConv2dGrads& p, unsigned seed) {
#if defined(SIMT_REMOVED)
  launch(convmae::cuda::masked_conv2d_grads_tiles<convmae::Half, 2, 5>, dim3(p.slices, p.shares),
         dim3(32, convmae::cuda::kReducingWarps<2, 5>), 0, seed, p);
#else
  convmae::cuda::launch_masked_conv2d_grads(p, Launcher{seed});
#endif
}

}  // namespace simt
