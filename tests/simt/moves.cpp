// Kernels that move elements, add what they move, and count blocks.
#include "simt.h"
//
#include "cuda/gather_visible.cuh"
#include "cuda/gather_windows.cuh"
#include "cuda/gather_windows_grad.cuh"
#include "cuda/neighbour_table.cuh"
#include "cuda/scatter_visible.cuh"
#include "kernels.h"

namespace simt {

uint64_t divide(uint64_t x, uint64_t divisor) { return convmae::cuda::Divisor(divisor).divide(x); }

void gather_visible(const convmae::GatherVisibleParams& p, unsigned seed) {
  convmae::cuda::launch_gather_visible(p, Launcher{seed});
}

void scatter_visible(const convmae::ScatterVisibleRows& rows,
                     const convmae::ScatterVisibleParams& p, unsigned seed) {
  convmae::cuda::launch_scatter_visible(rows, p, Launcher{seed});
}

void gather_windows(const convmae::GatherWindowsParams& p, unsigned seed) {
  convmae::cuda::launch_gather_windows(p, Launcher{seed});
}

void gather_windows_grad(const convmae::GatherWindowsParams& p, unsigned seed) {
  convmae::cuda::launch_gather_windows_grad(p, Launcher{seed});
}

void neighbour_table(const convmae::NeighbourTableParams& p, unsigned seed) {
  convmae::cuda::launch_neighbour_table(p, Launcher{seed});
}

}  // namespace simt
