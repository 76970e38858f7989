// Kernels that test the emulator itself: one for each promise that it makes.
#pragma once

#include "simt.h"

namespace simt_test {

__global__ void ids(int* out) {
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] = block * 1000 + thread;
}

// out[block] = sum of the block's 256 values of x, by halving.
__global__ void __launch_bounds__(256) block_sum(const float* __restrict__ x, float* out) {
  __shared__ float sums[256];
  const int i = threadIdx.x;
  sums[i] = x[blockIdx.x * 256 + i];
  __syncthreads();
  for (int half = 128; half > 0; half /= 2) {
    if (i < half) sums[i] += sums[i + half];
    __syncthreads();
  }
  if (i == 0) out[blockIdx.x] = sums[0];
}

// The values of each block in reverse order, through dynamic shared memory.
__global__ void reverse(const float* x, float* out) {
  extern __shared__ __align__(16) float values[];
  const int i = threadIdx.x, n = blockDim.x;
  values[i] = x[blockIdx.x * n + i];
  __syncthreads();
  out[blockIdx.x * n + i] = values[n - 1 - i];
}

// What is in shared memory before anything was written.
__global__ void uninitialised(float* out) {
  __shared__ float tile[2][32];
  out[blockIdx.x * 32 + threadIdx.x] = tile[1][threadIdx.x];
  tile[1][threadIdx.x] = 0;
}

// The four shuffles and the three votes of every warp, one row each.
__global__ void warp_calls(const int* x, int* out, int width) {
  const int i = threadIdx.x, n = blockDim.x, value = x[i];
  out[i] = __shfl_sync(0xffffffffu, value, 3, width);
  out[n + i] = __shfl_up_sync(0xffffffffu, value, 2, width);
  out[2 * n + i] = __shfl_down_sync(0xffffffffu, value, 5, width);
  out[3 * n + i] = __shfl_xor_sync(0xffffffffu, value, 6, width);
  out[4 * n + i] = int(__ballot_sync(0xffffffffu, value & 1));
  out[5 * n + i] = __any_sync(0xffffffffu, value == 7);
  out[6 * n + i] = __all_sync(0xffffffffu, value >= 0);
  __syncwarp();
}

// Every thread adds up what its left neighbours in the warp hold: the lanes of a mask only.
__global__ void half_warps(const int* x, int* out) {
  const int i = threadIdx.x;
  const unsigned mask = i % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  int value = x[i];
  for (int step = 1; step < 16; step *= 2) {
    const int left = __shfl_up_sync(mask, value, step, 16);
    if (i % 16 >= step) value += left;
  }
  out[i] = value;
}

// The threads of a warp hand values on through shared memory.
__global__ void warp_exchange(const int* x, int* out) {
  __shared__ int values[64];
  const int i = threadIdx.x;
  values[i] = x[i];
  __syncwarp();
  out[i] = values[i ^ 1];
}

__global__ void counts(const int* x, int* out) {
  const int i = threadIdx.x;
  out[3 * i] = __syncthreads_count(x[i]);
  out[3 * i + 1] = __syncthreads_or(x[i]);
  out[3 * i + 2] = __syncthreads_and(x[i]);
}

// Half the threads leave before the barrier, which waits for the others only.
__global__ void early_exit(int* out) {
  __shared__ int tile[64];
  const int i = threadIdx.x;
  if (i % 2 == 1) return;
  tile[i] = i;
  __syncthreads();
  out[i] = tile[(i + 2) % 64];
}

__global__ void divergent_barrier(int* out) {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}

__global__ void barrier_against_shuffle(int* out) {
  if (threadIdx.x == 5) {
    __syncthreads();
  } else {
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1);
  }
}

__global__ void mask_without_caller(int* out) { out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1, 0); }

__global__ void empty_mask(int* out) { out[threadIdx.x] = __any_sync(0, 1); }

__global__ void shuffle_from_outside_the_mask(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1, 20);
}

__global__ void past_the_output(int* out, int n) {
  if (int(threadIdx.x) <= n) out[threadIdx.x] = 1;
}

__global__ void past_shared_memory(int* out) {
  __shared__ int tile[33];
  int* const beyond = tile + 2;
  beyond[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x % 31];
}

__global__ void past_dynamic_shared_memory(int* out) {
  extern __shared__ int tile[];
  out[threadIdx.x] = tile[threadIdx.x + 1] == 0;
}

// All thread blocks write the same values.
__global__ void same_bytes(int* out) { out[threadIdx.x] = 1; }

__global__ void misaligned_vector(int* out) {
  const int4 value = make_int4(0, 1, 2, 3);
  *reinterpret_cast<int4*>(out + 4 * threadIdx.x + 1) = value;
}

// The values of each block in reverse order, through asynchronous copies.
__global__ void reverse_copies(const int* x, int* out) {
  __shared__ __align__(16) int values[64][4];
  const int i = threadIdx.x, n = blockDim.x;
  __pipeline_memcpy_async(values[i], x + 4 * i, 16);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();
  for (int j = 0; j < 4; ++j) out[4 * i + j] = values[n - 1 - i][3 - j];
}

}  // namespace simt_test
