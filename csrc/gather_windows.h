// Each visible block with the positions around it, and the gradient of that: parameters, launches.
#pragma once

#include <cstdint>

#include "isa.h"
#include "launch.h"
#include "numbers.h"

namespace convmae {

// The packed features are [blocks, side * side, channels], the windows [blocks, rows, columns,
// channels], both contiguous; a window begins `top` rows above its block and `left` columns left of
// it, and ends anywhere within `radius` blocks.
struct GatherWindowsParams {
  const void* from;           // packed features; for the gradient, the windows'
  void* to;                   // windows; for the gradient, the packed features'
  const int32_t* neighbours;  // [blocks, (2 * radius + 1)^2]
  const void* fill;           // one element, on the host: hidden positions; not for the gradient
  int64_t blocks, channels;
  int side, radius, top, left, rows, columns;
  DType dtype;
};

namespace cpu {

// They write the windows, or the gradients, of the blocks [begin, end).
void gather_windows(const GatherWindowsParams& p, int64_t begin, int64_t end);
template <Isa isa>
void gather_windows_grad(const GatherWindowsParams& p, int64_t begin, int64_t end);
}  // namespace cpu
namespace cuda {
LaunchError gather_windows(const GatherWindowsParams& p, Stream stream);
LaunchError gather_windows_grad(const GatherWindowsParams& p, Stream stream);
}  // namespace cuda
}  // namespace convmae
