#include "simt.h"
//
#include "cuda/masked_conv2d_tensor.cuh"
#include "kernels.h"

namespace simt {

void masked_conv2d_tensor(const convmae::cuda::MaskedConv2dForward& p, unsigned seed) {
  convmae::cuda::launch_masked_conv2d_tensor(p, Launcher{seed});
}

}  // namespace simt
