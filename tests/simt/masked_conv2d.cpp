#include "simt.h"
//
#include "cuda/masked_conv2d.cuh"
#include "kernels.h"

namespace simt {

void masked_conv2d(const convmae::cuda::MaskedConv2dForward& p, unsigned seed) {
#if defined(SIMT_REMOVED)
  launch(convmae::cuda::masked_conv2d_tiles<float, 4, 5>, dim3(p.slices, p.runs), 32, 0, seed, p);
#else
  convmae::cuda::launch_masked_conv2d(p, Launcher{seed});
#endif
}

}  // namespace simt
