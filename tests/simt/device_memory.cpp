// See device_memory.h. Compiled without a sanitizer.
#include "device_memory.h"

#include <algorithm>
#include <utility>

namespace simt {

DeviceMemory& DeviceMemory::get() {
  static DeviceMemory memory;
  return memory;
}

void DeviceMemory::add(const void* begin, size_t bytes) {
  Array array{static_cast<const char*>(begin), {}, {}, {}};
  array.traffic.bytes = bytes;
  arrays_.push_back(std::move(array));
}

void DeviceMemory::remove(const void* begin) {
  const auto found = std::find_if(arrays_.begin(), arrays_.end(),
                                  [&](const Array& array) { return array.begin == begin; });
  if (found == arrays_.end()) return;
  log_.push_back(found->traffic);
  arrays_.erase(found);
}

void DeviceMemory::begin_kernel() {
  for (Array& array : arrays_) {
    array.read.assign(array.traffic.bytes, false);
    array.writers.assign(array.traffic.bytes, 0);
  }
}

std::string DeviceMemory::access(const void* address, size_t bytes, bool write, uint64_t block) {
  for (Array& array : arrays_) {
    const ptrdiff_t offset = static_cast<const char*>(address) - array.begin;
    Traffic& traffic = array.traffic;
    if (offset < 0 || offset + bytes > traffic.bytes || array.read.empty()) continue;
    (write ? traffic.written : traffic.read) += bytes;
    for (size_t i = offset; i < offset + bytes; ++i) {
      uint64_t& writer = array.writers[i];
      if (writer != 0 && writer != block + 1) {
        return std::string(write ? "writes" : "reads") + " byte " + std::to_string(i) +
               " of an array of " + std::to_string(traffic.bytes) + " bytes, which thread block " +
               std::to_string(writer - 1) + " has written";
      }
      if (write) {
        traffic.written_once += writer == 0;
        writer = block + 1;
      } else {
        traffic.read_once += !array.read[i];
        array.read[i] = true;
      }
    }
  }
  return "";
}

std::vector<Traffic> DeviceMemory::take_log() { return std::exchange(log_, {}); }

}  // namespace simt
