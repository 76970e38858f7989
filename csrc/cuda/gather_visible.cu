// Launches; the kernels are in gather_visible.cuh.
#include "cuda/gather_visible.cuh"
#include "cuda/launcher.cuh"

namespace convmae::cuda {

LaunchError gather_visible(const GatherVisibleParams& p, Stream stream) {
  Launcher launcher{"gather_visible", stream};
  launch_gather_visible(p, launcher);
  return launcher.error;
}

}  // namespace convmae::cuda
