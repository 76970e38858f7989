// The threads of one CUDA block as fibers on one CPU thread, in an order that a seed decides.
//
// seed 0: each thread runs as far as it can, in ascending order; seed 1: in descending order;
// seed 2, 4, ...: in random order; seed 3, 5, ...: in random order and interrupted at random memory
// accesses. Blocks run one after another, in the order 0, 1, ..., its reverse, or shuffled.
//
// Threads that have returned take part in no barrier and no warp call any more, as on hardware
// since compute capability 7.0; only reading such a lane in a shuffle is an error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace simt {

// What a thread waits for: a barrier of the block, or a call that the lanes in `mask` make
// together.
constexpr uint64_t kBlock = 1ull << 32;  // no mask of lanes
struct Call {
  const char* name = "";
  int line = 0;
  uint64_t mask = kBlock;
  uint64_t bits = 0;  // what the thread brings
  int source = 0;     // the lane whose bits it asks for; kAll: those of all lanes, or-ed
  bool orders_memory = false;
};
constexpr int kAll = -1;

// Runs `kernel` once for every thread of the grid.
//
// Throws std::runtime_error, with the block and the thread, if the launch is beyond CUDA's limits
// or a thread does what is undefined: waits for ever or at another barrier than the rest, shuffles
// with lanes that take no part, copies to misaligned addresses, races on shared memory.
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, unsigned seed,
              const std::function<void()>& kernel);

// Waits until every thread that the call concerns makes it; returns what the thread asked for.
uint64_t wait(const Call& call);

// For operations of a whole warp: `all` is what its 32 lanes bring, `bytes` each. It orders no
// memory.
void exchange(const void* own, size_t bytes, void* all);

// The array of shared memory of that key, as long as asked for at first, NaN before every block.
char* shared(int key, size_t bytes);
char* dynamic_shared();

// Copies when `wait_copies` asks for it, or at a random moment before.
void copy_later(void* to, const void* from, size_t bytes);
void commit_copies();
void wait_copies(int pending);  // until all but the last `pending` groups are done

}  // namespace simt
