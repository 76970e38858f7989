// Launches; the kernels are in gather_windows_grad.cuh.
#include "cuda/gather_windows_grad.cuh"
#include "cuda/launcher.cuh"

namespace convmae::cuda {

LaunchError gather_windows_grad(const GatherWindowsParams& p, Stream stream) {
  Launcher launcher{"gather_windows_grad", stream};
  launch_gather_windows_grad(p, launcher);
  return launcher.error;
}

}  // namespace convmae::cuda
