// Launches; the kernels are in neighbour_table.cuh.
#include "cuda/launcher.cuh"
#include "cuda/neighbour_table.cuh"

namespace convmae::cuda {

LaunchError neighbour_table(const NeighbourTableParams& p, Stream stream) {
  Launcher launcher{"neighbour_table", stream};
  launch_neighbour_table(p, launcher);
  return launcher.error;
}

}  // namespace convmae::cuda
