// Launches; the kernels are in gather_windows.cuh.
#include "cuda/gather_windows.cuh"
#include "cuda/launcher.cuh"

namespace convmae::cuda {

LaunchError gather_windows(const GatherWindowsParams& p, Stream stream) {
  Launcher launcher{"gather_windows", stream};
  launch_gather_windows(p, launcher);
  return launcher.error;
}

}  // namespace convmae::cuda
