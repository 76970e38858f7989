// CPU kernel: the share of some blocks in the gradients of a grouped convolution in weight and
// bias; compiled once for each instruction set, CONVMAE_ISA. For each tap the positions that see
// something are listed; sums over them stay in registers.
#include "cpu/grouped.h"

namespace convmae {
namespace {

using cpu::GroupedConv2dWeightGrad;

constexpr bool kManyRegisters = kVecBytes == 64;  // 32 with AVX-512, else 16
constexpr int kMaxVectors = 3;

// What meets with each tap of a chunk: rows of the source and of the gradient.
template <class A>
struct Meeting {
  const A *x, *grad;
};

// sums[I][V] += x[i] * grad[v] of all meetings, from zero: each addition to a long sum rounds anew.
template <class A, int I, int V, bool Merged>
void correlate(const GroupedLayout& layout, const Meeting<A>* meetings, int64_t count,
               int64_t in_channel, int64_t out_channel, LaneIndex<A> index, A* sums) {
  constexpr int n = kLanes<A>;
  Full<A> sum[I][V];
  unroll<I>([&](auto i) { unroll<V>([&](auto v) { sum[i][v] = Full<A>{}; }); });
  for (int64_t m = 0; m < count; ++m) {
    const A* const x = meetings[m].x + in_channel;
    const A* const grad = meetings[m].grad + out_channel;
    Full<A> factor[V];
    unroll<V>([&](auto v) { factor[v] = load<n>(grad + v * n); });
    if constexpr (Merged) {
      const Full<A> inputs = load<n>(x);
      unroll<I>([&](auto i) { sum[i][0] += pick<A>(inputs, index + i.value) * factor[0]; });
    } else {
      unroll<I>([&](auto i) {
        const Full<A> input = all_lanes(x[i]);
        unroll<V>([&](auto v) { sum[i][v] += input * factor[v]; });
      });
    }
  }
  unroll<I>([&](auto i) {
    unroll<V>([&](auto v) {
      A* const to = sums + i * layout.row() + v * n;
      store<n>(to, load<n>(to) + sum[i][v]);
    });
  });
}

// All inputs of a group; `sums` [in][row].
template <class A, int V, bool Merged>
void correlate_inputs(const GroupedLayout& layout, const Meeting<A>* meetings, int64_t count,
                      int64_t in_channel, int64_t out_channel, LaneIndex<A> index, A* sums) {
  constexpr int most = V == 1 || kManyRegisters ? 8 : 4;
  int64_t i = 0;
  const auto run = [&](auto inputs) {
    for (; i + inputs <= layout.in; i += inputs) {
      using Number = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
      correlate<A, decltype(inputs)::value, V, Merged>(layout, meetings, count,
                                                       in_channel + (Merged ? 0 : i), out_channel,
                                                       index + Number(i), sums + i * layout.row());
    }
  };
  run(Index<most>{});
  run(Index<4>{});
  run(Index<1>{});
}

template <class A>
void correlate_bundle(const GroupedLayout& layout, int64_t bundle, const Meeting<A>* meetings,
                      int64_t count, LaneIndex<A> index, A* sums) {
  const int64_t in = bundle * layout.merged * layout.in, vectors = layout.vectors();
  const int64_t calls = (vectors + kMaxVectors - 1) / kMaxVectors;
  for (int64_t call = 0; call < calls; ++call) {
    const int64_t first = call * vectors / calls, last = (call + 1) * vectors / calls;
    const int64_t lane = first * kLanes<A>, out = bundle * layout.merged * layout.out + lane;
    if (layout.merged > 1) {
      correlate_inputs<A, 1, true>(layout, meetings, count, in, out, index, sums + lane);
    } else {
      switch (last - first) {
        case 1:
          correlate_inputs<A, 1, false>(layout, meetings, count, in, out, index, sums + lane);
          break;
        case 2:
          correlate_inputs<A, 2, false>(layout, meetings, count, in, out, index, sums + lane);
          break;
        case 3:
          correlate_inputs<A, 3, false>(layout, meetings, count, in, out, index, sums + lane);
          break;
      }
    }
  }
}

template <class A>
void correlate_chunks(const GroupedConv2dWeightGrad& p, A* partial, int64_t begin, int64_t end) {
  const GroupedLayout& layout = p.layout;
  const int64_t channels = layout.groups * layout.out, taps = layout.taps;
  const Rows<A> source(p.source, p.blocks * p.source_positions, layout.groups * layout.in);
  const Rows<A> grads(p.grad, p.blocks * p.positions, channels);
  const int64_t capacity = p.chunk_blocks * p.positions;
  const Buffer<Meeting<A>> meetings(taps * capacity);
  const Buffer<const A*> rows(capacity);
  const Buffer<int64_t> counts(taps);
  const LaneIndex<A> index = first_inputs<A>(layout);
  A* const bias = partial + layout.size();
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    std::memset(counts.get(), 0, taps * sizeof(int64_t));
    const int64_t positions = for_positions(p, chunk, [&](int64_t i, int64_t block, int64_t rank) {
      rows.get()[i] = grads[block * p.positions + rank];
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t row = source_row(p, block, rank, tap);
        if (row < 0) continue;
        meetings.get()[tap * capacity + counts.get()[tap]++] = {source[row], rows.get()[i]};
      }
    });
    for_vectors<A>(channels, [&](auto n, int64_t c) {
      Vec<A, n> sum = {};
      for (int64_t i = 0; i < positions; ++i) sum += load<n>(rows.get()[i] + c);
      store<n>(bias + c, load<n>(bias + c) + sum);
    });
    for (int64_t bundle = 0; bundle < layout.bundles(); ++bundle) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        if (counts.get()[tap] == 0) continue;
        correlate_bundle(layout, bundle, meetings.get() + tap * capacity, counts.get()[tap], index,
                         partial + (bundle * taps + tap) * layout.in * layout.row());
      }
    }
  }
}

}  // namespace

namespace cpu {
template <>
void grouped_conv2d_weight_grad<Isa::CONVMAE_ISA>(const GroupedConv2dWeightGrad& p, void* partial,
                                                  int64_t begin, int64_t end) {
  static_assert(vector_bytes(Isa::CONVMAE_ISA) == kVecBytes);
  if (p.dtype == DType::Double) {
    return correlate_chunks(p, static_cast<double*>(partial), begin, end);
  }
  correlate_chunks(p, static_cast<float*>(partial), begin, end);
}
}  // namespace cpu
}  // namespace convmae
