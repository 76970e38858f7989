// Convolution of packed features in groups of channels, and its gradients: checks, allocation,
// registration. For CPUs; where there are no kernels, the reference runs.
#include "grouped_conv2d.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "common.h"

namespace convmae {
namespace {

// What the ops share: a convolution from blocks of side `side`, with stride, to blocks of side
// side / stride.
struct Shape {
  int64_t groups, in, out;  // channels of one group
  int64_t side, stride;
  int64_t kernel[2], padding[2], dilation[2];
  int64_t radius;

  int64_t taps() const { return kernel[0] * kernel[1]; }
  int64_t out_side() const { return side / stride; }
};

// `side` is known when the features have been looked at.
Shape make_shape(const Tensor& neighbours, const std::vector<int64_t>& kernel, int64_t stride,
                 const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                 int64_t groups) {
  STD_TORCH_CHECK(neighbours.dim() == 2 && neighbours.scalar_type() == ScalarType::Int,
                  "neighbours must be int32 [T, (2 * radius + 1) ** 2]");
  STD_TORCH_CHECK(kernel.size() == 2 && kernel[0] >= 1 && kernel[1] >= 1,
                  "kernel must be two positive integers");
  STD_TORCH_CHECK(dilation.size() == 2 && dilation[0] >= 1 && dilation[1] >= 1,
                  "dilation must be two positive integers");
  STD_TORCH_CHECK(padding.size() == 2, "padding must be two integers");
  STD_TORCH_CHECK(groups >= 1, "groups must be positive");
  STD_TORCH_CHECK(stride >= 1 && (stride & (stride - 1)) == 0, "stride must be a power of two");
  const int64_t n = std::lround(std::sqrt(double(neighbours.size(1))));
  STD_TORCH_CHECK(n * n == neighbours.size(1) && n % 2 == 1, "neighbours is no table");
  Shape s = {};
  s.groups = groups;
  s.stride = stride;
  s.radius = (n - 1) / 2;
  for (int axis = 0; axis < 2; ++axis) {
    s.kernel[axis] = kernel[axis];
    s.padding[axis] = padding[axis];
    s.dilation[axis] = dilation[axis];
  }
  return s;
}

// The side of the blocks of packed features, which must fit the table.
int64_t side_of(const Tensor& x, const Tensor& neighbours, const char* name) {
  check_same_device(neighbours, "neighbours", x);
  check_floating(x, name);
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == neighbours.size(0), name,
                  " must be [T, s*s, C], with a row of neighbours for each block");
  const int64_t side = std::lround(std::sqrt(double(x.size(1))));
  STD_TORCH_CHECK(side >= 1 && side <= 32 && (side & (side - 1)) == 0 && side * side == x.size(1),
                  "block sides are 1, 2, 4, 8, 16 or 32");
  return side;
}

// Channels of a group, from the weight [groups * out, in, kh, kw].
void set_channels(Shape& s, const Tensor& weight, const Tensor& features) {
  check_same_device(weight, "weight", features);
  STD_TORCH_CHECK(weight.scalar_type() == features.scalar_type(),
                  "weight must have the dtype of the features");
  STD_TORCH_CHECK(weight.size(0) % s.groups == 0, "groups must divide the outputs of weight");
  s.in = weight.size(1);
  s.out = weight.size(0) / s.groups;
}

// The place that an output sees with a tap, or an input that a tap meets on its way back.
Place see(const Shape& s, const int64_t at[2], const int64_t tap[2], bool backwards) {
  const int64_t side = backwards ? s.out_side() : s.side;
  int64_t seen[2];
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t shift = tap[axis] * s.dilation[axis] - s.padding[axis];
    const int64_t difference = at[axis] - shift;
    if (backwards && difference % s.stride != 0) return {-1, 0};
    seen[axis] = backwards ? difference / s.stride : at[axis] * s.stride + shift;
    STD_TORCH_CHECK(seen[axis] >= -s.radius * side && seen[axis] < (s.radius + 1) * side,
                    "neighbours does not reach as far as the kernel");
  }
  return place(int(seen[0]), int(seen[1]), int(side), int(s.radius));
}

// `GroupedConv2dParams::places`, for the outputs, or backwards for the inputs.
std::vector<Place> make_places(const Shape& s, bool backwards) {
  const int64_t side = backwards ? s.side : s.out_side();
  std::vector<Place> places;
  places.reserve(size_t(side * side * s.taps()));
  for (int rank = 0; rank < side * side; ++rank) {
    const int64_t at[2] = {zorder_row(rank), zorder_column(rank)};
    for (int64_t i = 0; i < s.kernel[0]; ++i) {
      for (int64_t j = 0; j < s.kernel[1]; ++j) {
        const int64_t tap[2] = {i, j};
        places.push_back(see(s, at, tap, backwards));
      }
    }
  }
  return places;
}

// Groups that share a vector; Baseline has no instruction that moves lanes about as `pick` does.
GroupedLayout make_layout(ScalarType acc, int64_t groups, int64_t in, int64_t out, int64_t taps) {
  const Isa isa = with_isa([](auto isa) { return Isa(isa); });
  const int64_t lanes = vector_bytes(isa) / (acc == ScalarType::Double ? 8 : 4);
  const int64_t fit = isa == Isa::Baseline ? 1 : lanes / std::max(in, out);
  return {groups, in, out, taps, lanes, std::clamp<int64_t>(fit, 1, groups)};
}

// Positions that one chunk has at least, where there are as many.
constexpr int64_t kChunkPositions = 128;

void fill_params(cpu::GroupedConv2dParams& p, const Shape& s, const Tensor& source,
                 const Tensor& neighbours, const std::vector<Place>& places, bool backwards) {
  const int64_t side = backwards ? s.side : s.out_side();
  p.layout = backwards ? make_layout(source.scalar_type(), s.groups, s.out, s.in, s.taps())
                       : make_layout(source.scalar_type(), s.groups, s.in, s.out, s.taps());
  p.dtype = dtype_of(source);
  p.source = source.const_data_ptr();
  p.neighbours = neighbours.const_data_ptr<int32_t>();
  p.places = places.data();
  p.blocks = source.size(0);
  p.positions = side * side;
  p.source_positions = source.size(1);
  p.table_columns = neighbours.size(1);
  p.classes = backwards ? s.stride * s.stride : 1;
  p.chunk_blocks = std::max<int64_t>(1, kChunkPositions / p.positions);
}

// Calls f(where in a weight [groups * out, in, taps], where in the kernels' layout) for a bundle;
// backwards the roles of `in` and `out` are exchanged in the layout.
template <class F>
void for_weights(const GroupedLayout& l, int64_t bundle, bool backwards, F&& f) {
  const int64_t along_out = l.taps * (backwards ? 1 : l.in);
  const int64_t along_in = l.taps * (backwards ? l.out : 1);
  const int64_t outputs = l.outputs(bundle), size = l.in * l.out * l.taps;
  for (int64_t first = 0; first < outputs; first += l.out) {
    const int64_t group = bundle * l.merged + first / l.out;
    for (int64_t i = 0; i < l.in; ++i) {  // then the taps, which are neighbours in a weight
      for (int64_t tap = 0; tap < l.taps; ++tap) {
        const int64_t from = group * size + i * along_in + tap;
        const int64_t to = ((bundle * l.taps + tap) * l.in + i) * l.row() + first;
        for (int64_t o = 0; o < l.out; ++o) f(from + o * along_out, to + o);
      }
    }
  }
}

template <class A>
void pack_weight(const GroupedLayout& l, const Tensor& weight, bool backwards, Tensor& packed) {
  const A* from = weight.const_data_ptr<A>();
  A* to = packed.mutable_data_ptr<A>();
  const int64_t size = l.size() / l.bundles();
  torch::stable::parallel_for(0, l.bundles(), grain(size), [&](int64_t begin, int64_t end) {
    std::fill(to + begin * size, to + end * size, A(0));
    for (int64_t bundle = begin; bundle < end; ++bundle) {
      for_weights(l, bundle, backwards, [&](int64_t i, int64_t o) { to[o] = from[i]; });
    }
  });
}

template <class A>
void unpack_weight(const GroupedLayout& l, const Tensor& packed, Tensor& weight) {
  const A* from = packed.const_data_ptr<A>();
  A* to = weight.mutable_data_ptr<A>();
  const int64_t size = l.size() / l.bundles();
  torch::stable::parallel_for(0, l.bundles(), grain(size), [&](int64_t begin, int64_t end) {
    for (int64_t bundle = begin; bundle < end; ++bundle) {
      for_weights(l, bundle, false, [&](int64_t i, int64_t o) { to[i] = from[o]; });
    }
  });
}

template <class A>
void pack_bias(const GroupedLayout& l, const Tensor& bias, Tensor& packed) {
  const A* from = bias.const_data_ptr<A>();
  A* to = packed.mutable_data_ptr<A>();
  for (int64_t bundle = 0; bundle < l.bundles(); ++bundle) {
    std::copy_n(from + bundle * l.merged * l.out, l.outputs(bundle), to + bundle * l.row());
  }
}

// The convolution, or backwards its gradient in the input, of `source`, which has a dtype of
// features.
Tensor convolve(const Shape& s, const Tensor& source_, const Tensor& weight_,
                const std::optional<Tensor>& bias, const Tensor& neighbours_, bool backwards) {
  const ScalarType acc = accumulation_type(source_);
  const Tensor source = torch::stable::contiguous(torch::stable::to(source_, acc));
  const Tensor weight = torch::stable::contiguous(torch::stable::to(weight_, acc));
  const Tensor neighbours = torch::stable::contiguous(neighbours_);
  const std::vector<Place> places = make_places(s, backwards);
  cpu::GroupedConv2dForward p;
  fill_params(p, s, source, neighbours, places, backwards);
  const GroupedLayout& l = p.layout;

  Tensor packed = torch::stable::new_empty(source, {l.size()});
  Tensor packed_bias = torch::stable::new_empty(source, {l.bundles() * l.row()});
  torch::stable::fill_(packed_bias, 0.0);
  const bool wide = acc == ScalarType::Double;
  (wide ? pack_weight<double> : pack_weight<float>)(l, weight, backwards, packed);
  if (bias.has_value()) {
    const Tensor values = torch::stable::contiguous(torch::stable::to(*bias, acc));
    (wide ? pack_bias<double> : pack_bias<float>)(l, values, packed_bias);
  }
  Tensor y = torch::stable::new_empty(source, {p.blocks, p.positions, l.groups * l.out});
  p.weight = packed.const_data_ptr();
  p.bias = packed_bias.const_data_ptr();
  p.y = y.mutable_data_ptr();
  const auto compute = with_isa([](auto isa) { return cpu::grouped_conv2d<isa>; });
  torch::stable::parallel_for(0, p.chunks(), 1,
                              [&](int64_t begin, int64_t end) { compute(p, begin, end); });
  return torch::stable::to(y, source_.scalar_type());
}

Tensor grouped_conv2d(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                      const Tensor& neighbours, int64_t stride, std::vector<int64_t> padding,
                      std::vector<int64_t> dilation, int64_t groups) {
  STD_TORCH_CHECK(weight.dim() == 4, "weight must be [C_out, C_in / groups, kh, kw]");
  Shape s =
      make_shape(neighbours, {weight.size(2), weight.size(3)}, stride, padding, dilation, groups);
  s.side = side_of(x, neighbours, "x");
  set_channels(s, weight, x);
  STD_TORCH_CHECK(s.side % stride == 0, "stride must divide the side of the blocks");
  STD_TORCH_CHECK(x.size(2) == groups * s.in, "x must have the channels that weight takes");
  if (bias.has_value()) {
    check_same_device(*bias, "bias", x);
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0), "bias must be [C_out]");
  }
  return convolve(s, x, weight, bias, neighbours, false);
}

Tensor grouped_conv2d_input_grad(const Tensor& grad, const Tensor& weight, const Tensor& neighbours,
                                 int64_t stride, std::vector<int64_t> padding,
                                 std::vector<int64_t> dilation, int64_t groups) {
  STD_TORCH_CHECK(weight.dim() == 4, "weight must be [C_out, C_in / groups, kh, kw]");
  Shape s =
      make_shape(neighbours, {weight.size(2), weight.size(3)}, stride, padding, dilation, groups);
  s.side = side_of(grad, neighbours, "grad") * stride;
  set_channels(s, weight, grad);
  STD_TORCH_CHECK(s.side <= 32, "block sides are at most 32");
  STD_TORCH_CHECK(grad.size(2) == weight.size(0), "grad must have the outputs of weight");
  return convolve(s, grad, weight, std::nullopt, neighbours, true);
}

// The chunks are cut into parts whose number depends on the problem alone, and the parts are added
// up in order: the same bits whatever the number of threads.
constexpr int64_t kChunksPerPart = 8, kMaxParts = 64, kMaxPartials = int64_t(1) << 23;

std::tuple<Tensor, Tensor> grouped_conv2d_weight_grad(
    const Tensor& grad_, const Tensor& x_, const Tensor& neighbours_, std::vector<int64_t> kernel,
    int64_t stride, std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups) {
  Shape s = make_shape(neighbours_, kernel, stride, padding, dilation, groups);
  s.side = side_of(x_, neighbours_, "x");
  STD_TORCH_CHECK(s.side % stride == 0 && side_of(grad_, neighbours_, "grad") == s.out_side() &&
                      grad_.scalar_type() == x_.scalar_type(),
                  "grad must have the blocks that x has after the stride, and its dtype");
  STD_TORCH_CHECK(grad_.size(2) % groups == 0 && x_.size(2) % groups == 0,
                  "groups must divide the channels of grad and of x");
  s.in = x_.size(2) / groups;
  s.out = grad_.size(2) / groups;

  const ScalarType acc = accumulation_type(x_);
  const Tensor x = torch::stable::contiguous(torch::stable::to(x_, acc));
  const Tensor grad = torch::stable::contiguous(torch::stable::to(grad_, acc));
  const Tensor neighbours = torch::stable::contiguous(neighbours_);
  const std::vector<Place> places = make_places(s, false);
  cpu::GroupedConv2dWeightGrad p;
  fill_params(p, s, x, neighbours, places, false);
  p.grad = grad.const_data_ptr();
  const GroupedLayout& l = p.layout;

  const int64_t outputs = groups * s.out, size = l.size() + outputs;
  const int64_t most = std::clamp<int64_t>(kMaxPartials / size, 4, kMaxParts);
  const int64_t parts =
      std::clamp<int64_t>((p.chunks() + kChunksPerPart - 1) / kChunksPerPart, 1, most);
  Tensor partial = torch::stable::new_empty(x, {parts, size});
  torch::stable::fill_(partial, 0.0);
  char* const data = static_cast<char*>(partial.mutable_data_ptr());
  const int64_t bytes = size * int64_t(partial.element_size());
  const auto compute = with_isa([](auto isa) { return cpu::grouped_conv2d_weight_grad<isa>; });
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      compute(p, data + part * bytes, part * p.chunks() / parts, (part + 1) * p.chunks() / parts);
    }
  });
  Tensor sum =
      parts == 1 ? torch::stable::reshape(partial, {size}) : torch::stable::new_empty(x, {size});
  if (parts > 1) add_parts(partial, sum);
  Tensor weight = torch::stable::new_empty(x, {outputs, s.in, kernel[0], kernel[1]});
  (acc == ScalarType::Double ? unpack_weight<double> : unpack_weight<float>)(l, sum, weight);
  const Tensor bias = torch::stable::clone(torch::stable::narrow(sum, 0, l.size(), outputs));
  return {torch::stable::to(weight, x_.scalar_type()), torch::stable::to(bias, x_.scalar_type())};
}

}  // namespace
}  // namespace convmae

STABLE_TORCH_LIBRARY_IMPL(convmae, CPU, m) {
  m.impl("grouped_conv2d", TORCH_BOX(&convmae::grouped_conv2d));
  m.impl("grouped_conv2d_input_grad", TORCH_BOX(&convmae::grouped_conv2d_input_grad));
  m.impl("grouped_conv2d_weight_grad", TORCH_BOX(&convmae::grouped_conv2d_weight_grad));
}
