// Depthwise convolution of packed features with a stride, an even kernel or one off its centre, and
// its gradients. For every shape; the channels lie along the threads, 16 bytes for each where they
// are aligned, one element otherwise. `channels` of the parameters is in units of V channels.
#pragma once

#include "cuda/rows.cuh"
#include "strided_conv2d.h"

namespace convmae::cuda {

// sum[v] += a.value[v] * b.value[v]
template <class T, int V>
__device__ inline void multiply_add(const Values<T, V>& a, const Values<T, V>& b,
                                    Acc<T> (&sum)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) sum[v] += load(&a.value[v]) * load(&b.value[v]);
}

// A thread computes up to four positions, those of the same rank but for its last two bits: with a
// tap, which is read once for them, their loads are in flight together. Each sum has the bias first
// and then the taps in order. A multiprocessor is to hold two blocks, three where each thread has
// one channel: without these bounds, or with the same for both, some sums go to local memory.
// Launch: grid ceil(blocks * ceil(positions / 4) / blockDim.y), block_of_rows.
template <class T, int V>
__global__ void __launch_bounds__(256, V == 1 ? 3 : 2)
    strided_conv2d_rows(StridedConv2dProducts p) {
  using Row = Values<T, V>;
  constexpr int kTogether = 4;
  const int side = p.backwards ? p.side : p.outputs_side();
  const int source_side = p.backwards ? p.outputs_side() : p.side;
  const int together = side == 1 ? 1 : kTogether, log = log2_side(side);
  const int64_t first = (int64_t(blockIdx.x) * blockDim.y + threadIdx.y) * together;
  const int64_t block = first >> 2 * log;
  if (block >= p.blocks) return;
  const int rank = int(first) & (side * side - 1);
  const int row = zorder_row(rank), column = zorder_column(rank);
  const int32_t* const table = p.neighbours + block * p.table_columns;
  for (int64_t c = threadIdx.x; c < p.channels; c += blockDim.x) {
    const Row* const source = static_cast<const Row*>(p.source) + c;
    const Row* weight = static_cast<const Row*>(p.weight) + c;
    Acc<T> sum[kTogether][V] = {};
    if (p.bias != nullptr) {
      const Row bias = static_cast<const Row*>(p.bias)[c];
#pragma unroll
      for (int o = 0; o < kTogether; ++o) {
#pragma unroll
        for (int v = 0; v < V; ++v) sum[o][v] = load(&bias.value[v]);
      }
    }
#pragma unroll 1
    for (int i = 0; i < p.kernel[0]; ++i) {
#pragma unroll 1
      for (int j = 0; j < p.kernel[1]; ++j, weight += p.channels) {
        int64_t at[kTogether];  // the row of the source; -1: hidden, or there is none
#pragma unroll
        for (int o = 0; o < kTogether; ++o) {
          at[o] = -1;
          if (o >= together) continue;
          const Place met = p.backwards ? met_output(p, row + o / 2, column + o % 2, i, j)
                                        : met_input(p, row + o / 2, column + o % 2, i, j);
          if (met.neighbour < 0) continue;
          const int64_t from = table[met.neighbour];
          if (from >= 0) at[o] = from * (source_side * source_side) + met.rank;
        }
        Row x[kTogether];
#pragma unroll
        for (int o = 0; o < kTogether; ++o) {
          if (at[o] >= 0) x[o] = source[at[o] * p.channels];
        }
        const Row tap = *weight;
#pragma unroll
        for (int o = 0; o < kTogether; ++o) {
          if (at[o] >= 0) multiply_add(x[o], tap, sum[o]);
        }
      }
    }
    Row* const result = static_cast<Row*>(p.result) + first * p.channels + c;
#pragma unroll
    for (int o = 0; o < kTogether; ++o) {
      if (o >= together) continue;
      Row y;
#pragma unroll
      for (int v = 0; v < V; ++v) store(sum[o][v], &y.value[v]);
      result[o * p.channels] = y;
    }
  }
}

// A thread sums one row of a run's share, of the bias or of a tap; four outputs are read at a time.
// Long sums are cut, as each addition to one rounds anew.
// Launch: grid (runs, ceil((1 + taps) / blockDim.y)), block_of_rows.
template <class T, int V>
__global__ void __launch_bounds__(256) strided_conv2d_weight_grad_rows(StridedConv2dWeightGrad p) {
  using Row = Values<T, V>;
  constexpr int kBatch = 4, kLongest = 64;
  const int row = int(blockIdx.y * blockDim.y + threadIdx.y);  // 0 the bias, 1 + tap
  if (row > p.taps()) return;
  const int i = (row - 1) / p.kernel[1], j = (row - 1) % p.kernel[1];
  const int log = log2_side(p.outputs_side()), positions = p.side * p.side;
  const int64_t run = blockIdx.x, first = run * p.blocks_per_run << 2 * log;
  const int64_t after = (run + 1) * p.blocks_per_run;
  const int64_t last = min(after, p.blocks) << 2 * log;
  for (int64_t c = threadIdx.x; c < p.channels; c += blockDim.x) {
    const Row* const x = static_cast<const Row*>(p.x) + c;
    const Row* const grad = static_cast<const Row*>(p.grad) + c;
    Acc<T> sum[V] = {}, total[V] = {};
#pragma unroll 1
    for (int64_t position = first; position < last; position += kBatch) {
      int64_t at[kBatch];  // the row of x; -1: hidden, or beyond the last
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        at[k] = -1;
        if (position + k >= last) continue;
        const int rank = int(position + k) & ((1 << 2 * log) - 1);
        if (row == 0) {
          at[k] = 0;
          continue;
        }
        const Place met = met_input(p, zorder_row(rank), zorder_column(rank), i, j);
        const int64_t block = (position + k) >> 2 * log;
        const int64_t from = p.neighbours[block * p.table_columns + met.neighbour];
        if (from >= 0) at[k] = from * positions + met.rank;
      }
      Row g[kBatch], met[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        if (at[k] < 0) continue;
        g[k] = grad[(position + k) * p.channels];
        if (row > 0) met[k] = x[at[k] * p.channels];
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        if (at[k] < 0) continue;
        if (row > 0) {
          multiply_add(g[k], met[k], sum);
          continue;
        }
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += load(&g[k].value[v]);
      }
      if ((position - first) % kLongest != kLongest - kBatch) continue;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        total[v] += sum[v];
        sum[v] = 0;
      }
    }
    Acc<T>* const partial =
        static_cast<Acc<T>*>(p.partial) + ((run * (1 + p.taps()) + row) * p.channels + c) * V;
#pragma unroll
    for (int v = 0; v < V; ++v) partial[v] = total[v] + sum[v];
  }
}

// Adds up the shares of the runs: eight threads take every eighth each, then one adds their sums.
// `channels` of p is in channels.
// Launch: grid ceil((1 + taps) * channels / 32), block (32, 8).
template <class T>
__global__ void __launch_bounds__(256) strided_conv2d_weight_grad_sum(StridedConv2dWeightGrad p) {
  __shared__ Acc<T> sums[8][32];
  const int64_t size = (1 + p.taps()) * p.channels;
  const int64_t i = int64_t(blockIdx.x) * 32 + threadIdx.x;
  Acc<T> sum = 0;
  if (i < size) {
    const Acc<T>* const partial = static_cast<const Acc<T>*>(p.partial) + i;
#pragma unroll 8
    for (int64_t run = threadIdx.y; run < p.runs; run += 8) sum += partial[run * size];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || i >= size) return;
#pragma unroll
  for (int y = 1; y < 8; ++y) sum += sums[y][threadIdx.x];
  const int64_t row = i / p.channels, channel = i % p.channels;
  T* const out = row == 0 ? static_cast<T*>(p.grad_bias) + channel
                          : static_cast<T*>(p.grad_weight) + channel * p.taps() + row - 1;
  store(sum, out);
}

// f(T{}, Index<V>{}, parameters whose channels are in units of V): 16 bytes where the tensors allow
// it, else one element.
template <class Params, class F>
void with_values(const Params& p, std::initializer_list<const void*> tensors, F&& f) {
  with_type(p.dtype, [&](auto type) {
    constexpr int n = int(sizeof(Chunk) / sizeof(type));
    bool wide = p.channels % n == 0;
    for (const void* tensor : tensors) wide = wide && is_aligned(tensor, sizeof(Chunk));
    if (!wide) return f(type, Index<1>{}, p);
    Params q = p;
    q.channels /= n;
    f(type, Index<n>{}, q);
  });
}

// Calls launch(kernel, grid, block, shared bytes, p).
template <class Launch>
void launch_strided_conv2d(const StridedConv2dProducts& p, Launch&& launch) {
  if (p.blocks == 0 || p.channels == 0) return;
  with_values(p, {p.source, p.weight, p.bias, p.result}, [&](auto type, auto v, const auto& q) {
    const int side = q.backwards ? q.side : q.outputs_side();
    const int64_t groups = q.blocks * side * side / (side == 1 ? 1 : 4);
    const dim3 block = block_of_rows(q.channels);
    const dim3 grid(unsigned((groups + block.y - 1) / block.y));
    launch(strided_conv2d_rows<decltype(type), v>, grid, block, 0, q);
  });
}

// Calls launch(kernel, grid, block, shared bytes, p), then for the kernel that adds up.
template <class Launch>
void launch_strided_conv2d_weight_grad(const StridedConv2dWeightGrad& p, Launch&& launch) {
  if (p.channels == 0) return;
  const int64_t rows = 1 + p.taps();
  with_values(p, {p.x, p.grad}, [&](auto type, auto v, const auto& q) {
    const dim3 block = block_of_rows(q.channels);
    const dim3 grid(unsigned(q.runs), unsigned((rows + block.y - 1) / block.y));
    using T = decltype(type);
    launch(strided_conv2d_weight_grad_rows<T, v>, grid, block, 0, q);
    launch(strided_conv2d_weight_grad_sum<T>, dim3(unsigned((rows * p.channels + 31) / 32)),
           dim3(32, 8), 0, p);
  });
}

}  // namespace convmae::cuda
