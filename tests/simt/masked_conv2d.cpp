#include "simt.h"
//
#include "cuda/masked_conv2d.cuh"
#include "kernels.h"

namespace simt {

void masked_conv2d(const convmae::cuda::MaskedConv2dForward& p, unsigned seed) {
  convmae::cuda::launch_masked_conv2d(p, Launcher{seed});
}

}  // namespace simt
