// The arrays in global memory: what kernels read and write of them, and thread blocks that write
// the same byte.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace simt {

// Bytes of an array, over all kernels that were launched while it was there. `read_once` and
// `written_once` count a byte once for each kernel that touches it.
struct Traffic {
  uint64_t bytes = 0, read_once = 0, written_once = 0, read = 0, written = 0;
};

class DeviceMemory {
 public:
  static DeviceMemory& get();

  void add(const void* begin, size_t bytes);
  void remove(const void* begin);  // and logs its traffic

  void begin_kernel();

  // Counts an access of a thread block. Returns what is wrong with it, "" if nothing is.
  std::string access(const void* address, size_t bytes, bool write, uint64_t block);

  // The traffic of the arrays that were removed since the last call, in that order.
  std::vector<Traffic> take_log();

 private:
  struct Array {
    const char* begin;
    Traffic traffic;
    std::vector<bool> read;         // by the current kernel
    std::vector<uint64_t> writers;  // 1 + the block that wrote the byte in the current kernel
  };

  std::vector<Array> arrays_;
  std::vector<Traffic> log_;
};

}  // namespace simt
