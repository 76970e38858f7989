// Launches of the project's kernels on the emulator.
#pragma once

#include <cstdint>

#include "gather_visible.h"
#include "gather_windows.h"
#include "masked_conv2d.h"
#include "neighbour_table.h"
#include "scatter_visible.h"
#include "strided_conv2d.h"

namespace simt {

uint64_t divide(uint64_t x, uint64_t divisor);
void gather_visible(const convmae::GatherVisibleParams& p, unsigned seed);
void scatter_visible(const convmae::ScatterVisibleRows& rows,
                     const convmae::ScatterVisibleParams& p, unsigned seed);
void gather_windows(const convmae::GatherWindowsParams& p, unsigned seed);
void gather_windows_grad(const convmae::GatherWindowsParams& p, unsigned seed);
void neighbour_table(const convmae::NeighbourTableParams& p, unsigned seed);
void masked_conv2d(const convmae::cuda::MaskedConv2dForward& p, unsigned seed);
void masked_conv2d_tensor(const convmae::cuda::MaskedConv2dForward& p, unsigned seed);
void masked_conv2d_weight_grad(const convmae::cuda::MaskedConv2dWeightGrad& p, unsigned seed);
void strided_conv2d(const convmae::cuda::StridedConv2dProducts& p, unsigned seed);
void strided_conv2d_weight_grad(const convmae::cuda::StridedConv2dWeightGrad& p, unsigned seed);
void masked_conv2d_weight_grad_sum(const convmae::cuda::MaskedConv2dWeightGrad& p, unsigned seed);
void masked_conv2d_grads(const convmae::cuda::MaskedConv2dGrads& p, unsigned seed);

}  // namespace simt
