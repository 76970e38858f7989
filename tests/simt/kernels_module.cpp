// The project's kernels, for Python: NumPy arrays are copied to memory of their exact size and
// back.
#include <optional>

#include "bindings.h"
#include "cuda/plan.h"
#include "kernels.h"

namespace {

namespace py = pybind11;
using convmae::cuda::Kernel;
using simt::DeviceArray;
using simt::Shape;
using Pair = std::array<int, 2>;

// `storage` is the memory of the images, the first of them at `first`; `strides` in elements.
// Blocks are found as among so many `cells` of all images.
py::array gather_visible(const py::array& storage, py::ssize_t first,
                         const std::array<int64_t, 4>& strides, const py::array& block_index,
                         int channels, Pair grid, int side, unsigned seed) {
  const DeviceArray images(storage), index(block_index);
  const DeviceArray y(storage.dtype(), {block_index.shape(0), side * side, channels});
  convmae::GatherVisibleParams p;
  p.images = static_cast<const char*>(images.data()) + first * storage.itemsize();
  p.block_index = static_cast<const int64_t*>(index.data());
  p.y = y.data();
  p.blocks = block_index.shape(0);
  p.channels = channels;
  p.grid_rows = grid[0];
  p.grid_columns = grid[1];
  p.stride_batch = strides[0];
  p.stride_channel = strides[1];
  p.stride_row = strides[2];
  p.stride_column = strides[3];
  p.side = side;
  p.element_size = int(storage.itemsize());
  simt::gather_visible(p, seed);
  return y.numpy();
}

// `fill` is an array of one element; x lies `offset` elements after a multiple of 16 bytes.
py::array scatter_visible(const py::array& x, const py::array& block_index, int batch, Pair grid,
                          const py::array& fill, size_t offset, unsigned seed) {
  const int side = int(std::lround(std::sqrt(double(x.shape(1)))));
  const py::ssize_t cells = py::ssize_t(batch) * grid[0] * grid[1];
  const DeviceArray in(x, offset), index(block_index), rows(py::dtype::of<int64_t>(), Shape{cells});
  const DeviceArray y(x.dtype(), {batch, grid[0] * side, grid[1] * side, x.shape(2)});
  convmae::ScatterVisibleRows r;
  r.block_index = static_cast<const int64_t*>(index.data());
  r.row_of_block = static_cast<int64_t*>(rows.data());  // new memory is -1
  r.blocks = x.shape(0);
  convmae::ScatterVisibleParams p;
  p.x = in.data();
  p.row_of_block = r.row_of_block;
  p.y = y.data();
  p.fill = fill.data();
  p.batch = batch;
  p.channels = x.shape(2);
  p.grid_rows = grid[0];
  p.grid_columns = grid[1];
  p.side = side;
  p.element_size = int(x.itemsize());
  simt::scatter_visible(r, p, seed);
  return y.numpy();
}

// `halo`: positions above, below, left and right of a block of `side`. Fills in all but `fill`.
convmae::GatherWindowsParams window_params(int dtype, const DeviceArray& in, const DeviceArray& out,
                                           const DeviceArray& table, const py::array& neighbours,
                                           int64_t channels, int side,
                                           const std::array<int, 4>& halo) {
  convmae::GatherWindowsParams p = {};
  p.from = in.data();
  p.to = out.data();
  p.neighbours = static_cast<const int32_t*>(table.data());
  p.blocks = neighbours.shape(0);
  p.channels = channels;
  p.side = side;
  p.radius = (int(std::lround(std::sqrt(double(neighbours.shape(1))))) - 1) / 2;
  p.top = halo[0];
  p.left = halo[2];
  p.rows = halo[0] + side + halo[1];
  p.columns = halo[2] + side + halo[3];
  p.dtype = convmae::DType(dtype);
  return p;
}

// `fill` is an array of one element; x lies `offset` elements after a multiple of 16 bytes.
py::array gather_windows(int dtype, const py::array& x, const py::array& neighbours,
                         const std::array<int, 4>& halo, const py::array& fill, size_t offset,
                         unsigned seed) {
  const int side = int(std::lround(std::sqrt(double(x.shape(1)))));
  const DeviceArray in(x, offset), table(neighbours);
  const DeviceArray out(
      x.dtype(), {x.shape(0), halo[0] + side + halo[1], halo[2] + side + halo[3], x.shape(2)});
  convmae::GatherWindowsParams p =
      window_params(dtype, in, out, table, neighbours, x.shape(2), side, halo);
  p.fill = fill.data();
  simt::gather_windows(p, seed);
  return out.numpy();
}

py::array gather_windows_grad(int dtype, const py::array& grad, const py::array& neighbours,
                              const std::array<int, 4>& halo, size_t offset, unsigned seed) {
  const int side = int(grad.shape(1)) - halo[0] - halo[1];
  const DeviceArray in(grad, offset), table(neighbours);
  const DeviceArray out(grad.dtype(), {grad.shape(0), side * side, grad.shape(3)});
  simt::gather_windows_grad(
      window_params(dtype, in, out, table, neighbours, grad.shape(3), side, halo), seed);
  return out.numpy();
}

py::array neighbour_table(const py::array& visible, const py::array& block_index, int radius,
                          unsigned seed) {
  const DeviceArray cells(visible), index(block_index);
  const DeviceArray table(py::dtype::of<int32_t>(),
                          {block_index.shape(0), (2 * radius + 1) * (2 * radius + 1)});
  convmae::NeighbourTableParams p;
  p.visible = static_cast<const bool*>(cells.data());
  p.block_index = static_cast<const int64_t*>(index.data());
  p.table = static_cast<int32_t*>(table.data());
  p.blocks = block_index.shape(0);
  p.grid_rows = visible.shape(1);
  p.grid_columns = visible.shape(2);
  p.radius = radius;
  simt::neighbour_table(p, seed);
  return table.numpy();
}

void fill_params(convmae::MaskedConv2dParams& p, int dtype, const py::array& x,
                 const DeviceArray& in, const py::array& neighbours, const DeviceArray& table,
                 Pair kernel, Pair dilation) {
  p.dtype = convmae::DType(dtype);
  p.x = in.data();
  p.neighbours = static_cast<const int32_t*>(table.data());
  p.blocks = x.shape(0);
  p.channels = x.shape(2);
  p.table_columns = neighbours.shape(1);
  p.side = int(std::lround(std::sqrt(double(x.shape(1)))));
  p.radius = (int(std::lround(std::sqrt(double(p.table_columns)))) - 1) / 2;
  p.kernel_rows = kernel[0];
  p.kernel_columns = kernel[1];
  p.dilation_rows = dilation[0];
  p.dilation_columns = dilation[1];
}

// `runs`: cut the tiles into that many runs; 0: as for a GPU that holds `warps`. x, weight and y
// lie `offset` elements after a multiple of 16 bytes. Also returns the side of the tiles, and
// whether it was the kernel on tensor cores.
std::tuple<py::array, int, bool> masked_conv2d(int dtype, const py::array& x,
                                               const py::array& weight,
                                               const std::optional<py::array>& bias,
                                               const py::array& neighbours, Pair dilation,
                                               size_t offset, int64_t warps, int64_t runs,
                                               unsigned seed) {
  const DeviceArray in(x, offset), taps(weight, offset), table(neighbours);
  const DeviceArray y(x.dtype(), Shape(x.shape(), x.shape() + 3), offset);
  std::optional<DeviceArray> bias_row;
  if (bias) bias_row.emplace(*bias);
  convmae::cuda::MaskedConv2dForward p;
  fill_params(p, dtype, x, in, neighbours, table, {int(weight.shape(2)), int(weight.shape(3))},
              dilation);
  p.weight = taps.data();
  p.bias = bias_row ? bias_row->data() : nullptr;
  p.y = y.data();
  convmae::cuda::plan_forward(p);
  convmae::cuda::cut_forward(p, warps);
  if (runs > 0) convmae::cuda::cut_runs(p, runs);
  const bool tensor = p.kernel == convmae::cuda::Kernel::Tensor;
  tensor ? simt::masked_conv2d_tensor(p, seed) : simt::masked_conv2d(p, seed);
  return {y.numpy(), p.tile_side, tensor};
}

// The kernels that are chosen, forward and for all gradients, on a GPU that holds so many
// warps; and how many runs they have.
std::tuple<std::string, int64_t, std::string, int64_t> plan(int dtype, int64_t blocks,
                                                            int64_t channels, int side, int kernel,
                                                            int64_t warps) {
  convmae::cuda::MaskedConv2dForward f = {};
  f.dtype = convmae::DType(dtype);
  f.blocks = blocks;
  f.channels = channels;
  f.side = side;
  f.kernel_rows = f.kernel_columns = kernel;
  f.dilation_rows = f.dilation_columns = 1;
  convmae::cuda::MaskedConv2dGrads g = {};
  static_cast<convmae::MaskedConv2dParams&>(g) = f;
  convmae::cuda::plan_forward(f);
  if (f.kernel == Kernel::Tiles) convmae::cuda::cut_forward(f, warps);
  convmae::cuda::plan_grads(g);
  return {convmae::cuda::name_of(f.kernel), f.runs, convmae::cuda::name_of(g.kernel), g.runs};
}

// The results of a weight gradient, and the shares that it sums.
struct WeightGradArrays {
  DeviceArray partial, weight, bias;

  WeightGradArrays(convmae::cuda::MaskedConv2dWeightGrad& p, const py::array& x)
      : partial(
            p.dtype == convmae::DType::Double ? py::dtype::of<double>() : py::dtype::of<float>(),
            {py::ssize_t(p.shares), 1 + p.kernel_rows * p.kernel_columns, py::ssize_t(p.channels)}),
        weight(x.dtype(), {py::ssize_t(p.channels), 1, p.kernel_rows, p.kernel_columns}),
        bias(x.dtype(), Shape{py::ssize_t(p.channels)}) {
    p.partial = partial.data();
    p.grad_weight = weight.data();
    p.grad_bias = bias.data();
  }
};

// Gradients of weight and bias, and the side of the tiles.
std::tuple<py::array, py::array, int> masked_conv2d_weight_grad(
    int dtype, const py::array& grad, const py::array& x, const py::array& neighbours, Pair kernel,
    Pair dilation, size_t offset, int64_t runs, unsigned seed) {
  const DeviceArray grad_in(grad, offset), in(x, offset), table(neighbours);
  convmae::cuda::MaskedConv2dWeightGrad p;
  fill_params(p, dtype, x, in, neighbours, table, kernel, dilation);
  p.grad = grad_in.data();
  convmae::cuda::plan_weight_grad(p);
  if (runs > 0) {
    convmae::cuda::cut_runs(p, runs);
    p.shares = p.runs;
  }
  const WeightGradArrays results(p, x);
  simt::masked_conv2d_weight_grad(p, seed);
  return {results.weight.numpy(), results.bias.numpy(), p.tile_side};
}

// Gradients of x, weight and bias, and the side of the tiles; where that is 0 the input gradient
// alone, of a forward kernel with flipped taps.
py::tuple masked_conv2d_grads(int dtype, const py::array& grad, const py::array& x,
                              const py::array& weight, const py::array& neighbours, Pair dilation,
                              size_t offset, int64_t runs, unsigned seed) {
  const DeviceArray grad_in(grad, offset), in(x, offset), taps(weight, offset), table(neighbours);
  const DeviceArray grad_x(x.dtype(), Shape(x.shape(), x.shape() + 3), offset);
  const Pair kernel = {int(weight.shape(2)), int(weight.shape(3))};
  convmae::cuda::MaskedConv2dGrads p;
  fill_params(p, dtype, x, in, neighbours, table, kernel, dilation);
  p.grad = grad_in.data();
  p.weight = taps.data();
  p.grad_x = grad_x.data();
  convmae::cuda::plan_grads(p);
  if (p.kernel == Kernel::Any) {
    convmae::cuda::MaskedConv2dForward f;
    fill_params(f, dtype, x, grad_in, neighbours, table, kernel, dilation);
    f.flipped = true;
    f.weight = taps.data();
    f.bias = nullptr;
    f.y = grad_x.data();
    convmae::cuda::plan_forward(f);
    convmae::cuda::cut_forward(f, 40);
    const bool tensor = f.kernel == convmae::cuda::Kernel::Tensor;
    tensor ? simt::masked_conv2d_tensor(f, seed) : simt::masked_conv2d(f, seed);
    return py::make_tuple(grad_x.numpy(), 0);
  }
  if (runs > 0) {
    const int64_t shares = p.shares / p.runs;
    convmae::cuda::cut_runs(p, runs);
    p.shares = shares * p.runs;
  }
  const WeightGradArrays results(p, x);
  simt::masked_conv2d_grads(p, seed);
  simt::masked_conv2d_weight_grad_sum(p, seed);
  return py::make_tuple(grad_x.numpy(), results.weight.numpy(), results.bias.numpy(), p.tile_side);
}

// `side`: of the blocks of the input.
void fill_strided(convmae::StridedConv2dParams& p, int dtype, const py::array& features, int side,
                  const py::array& neighbours, const DeviceArray& table, Pair kernel, int stride,
                  Pair padding, Pair dilation) {
  p.dtype = convmae::DType(dtype);
  p.neighbours = static_cast<const int32_t*>(table.data());
  p.blocks = features.shape(0);
  p.channels = features.shape(2);
  p.table_columns = neighbours.shape(1);
  p.side = side;
  p.stride = stride;
  p.radius = (int(std::lround(std::sqrt(double(p.table_columns)))) - 1) / 2;
  for (int axis = 0; axis < 2; ++axis) {
    p.kernel[axis] = kernel[axis];
    p.padding[axis] = padding[axis];
    p.dilation[axis] = dilation[axis];
  }
}

// `weight` is [taps, channels]. The source lies `offset` elements after a multiple of 16 bytes.
py::array strided_conv2d(int dtype, const py::array& source, const py::array& weight,
                         const std::optional<py::array>& bias, const py::array& neighbours,
                         Pair kernel, int stride, Pair padding, Pair dilation, bool backwards,
                         size_t offset, unsigned seed) {
  const DeviceArray in(source, offset), taps(weight), table(neighbours);
  std::optional<DeviceArray> bias_row;
  if (bias) bias_row.emplace(*bias);
  const int own = int(std::lround(std::sqrt(double(source.shape(1)))));
  const int side = backwards ? own * stride : own, result_side = backwards ? side : own / stride;
  const DeviceArray result(source.dtype(),
                           {source.shape(0), result_side * result_side, source.shape(2)});
  convmae::cuda::StridedConv2dProducts p;
  fill_strided(p, dtype, source, side, neighbours, table, kernel, stride, padding, dilation);
  p.backwards = backwards;
  p.source = in.data();
  p.weight = taps.data();
  p.bias = bias_row ? bias_row->data() : nullptr;
  p.result = result.data();
  simt::strided_conv2d(p, seed);
  return result.numpy();
}

// `blocks_per_run`: of the runs; 0: as planned.
std::tuple<py::array, py::array> strided_conv2d_weight_grad(
    int dtype, const py::array& grad, const py::array& x, const py::array& neighbours, Pair kernel,
    int stride, Pair padding, Pair dilation, size_t offset, int64_t blocks_per_run, unsigned seed) {
  const DeviceArray grad_in(grad, offset), in(x, offset), table(neighbours);
  convmae::cuda::StridedConv2dWeightGrad p;
  fill_strided(p, dtype, x, int(std::lround(std::sqrt(double(x.shape(1))))), neighbours, table,
               kernel, stride, padding, dilation);
  convmae::cuda::plan_strided_weight_grad(p);
  if (blocks_per_run > 0) {
    p.blocks_per_run = blocks_per_run;
    p.runs = (p.blocks + blocks_per_run - 1) / blocks_per_run;
  }
  const py::ssize_t channels = x.shape(2);
  const bool wide = p.dtype == convmae::DType::Double;
  const DeviceArray partial(wide ? py::dtype::of<double>() : py::dtype::of<float>(),
                            {py::ssize_t(p.runs), 1 + p.taps(), channels});
  const DeviceArray weight(x.dtype(), {channels, 1, kernel[0], kernel[1]});
  const DeviceArray bias(x.dtype(), Shape{channels});
  p.x = in.data();
  p.grad = grad_in.data();
  p.partial = partial.data();
  p.grad_weight = weight.data();
  p.grad_bias = bias.data();
  simt::strided_conv2d_weight_grad(p, seed);
  return {weight.numpy(), bias.numpy()};
}

}  // namespace

PYBIND11_MODULE(simt_kernels, m) {
  // Of the arrays of the calls since the last one: their bytes, those read and written, counted
  // once for each kernel, and all that were read and written. With the checker "races".
  m.def("take_traffic", [] {
    std::vector<std::array<uint64_t, 5>> log;
    for (const simt::Traffic& t : simt::DeviceMemory::get().take_log()) {
      log.push_back({t.bytes, t.read_once, t.written_once, t.read, t.written});
    }
    return log;
  });
  m.def("plan", &plan);
  m.def("divide", [](uint64_t x, uint64_t divisor, unsigned) { return simt::divide(x, divisor); });
  m.def("gather_visible", &gather_visible);
  m.def("scatter_visible", &scatter_visible);
  m.def("gather_windows", &gather_windows);
  m.def("gather_windows_grad", &gather_windows_grad);
  m.def("neighbour_table", &neighbour_table);
  m.def("masked_conv2d", &masked_conv2d);
  m.def("masked_conv2d_weight_grad", &masked_conv2d_weight_grad);
  m.def("strided_conv2d", &strided_conv2d);
  m.def("strided_conv2d_weight_grad", &strided_conv2d_weight_grad);
  m.def("masked_conv2d_grads", &masked_conv2d_grads);
}
