// Launches; the kernels are in scatter_visible.cuh.
#include "cuda/launcher.cuh"
#include "cuda/scatter_visible.cuh"

namespace convmae::cuda {

LaunchError scatter_visible(const ScatterVisibleRows& rows, const ScatterVisibleParams& p,
                            Stream stream) {
  Launcher launcher{"scatter_visible", stream};
  launch_scatter_visible(rows, p, launcher);
  return launcher.error;
}

}  // namespace convmae::cuda
