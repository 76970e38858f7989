// NumPy arrays as the memory of a device, for the pybind11 modules.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <vector>

#include "device_memory.h"

namespace simt {

namespace py = pybind11;
using Shape = std::vector<py::ssize_t>;

// A copy of an array at `offset` elements after an address that is a multiple of 16; the end is
// exact, so that AddressSanitizer sees the first byte beyond.
class DeviceArray {
 public:
  explicit DeviceArray(const py::array& array, size_t offset = 0)
      : array_(py::array::ensure(array, py::array::c_style)),
        skip_(offset * array_.itemsize()),
        memory_(new char[skip_ + array_.nbytes()]) {
    std::memcpy(memory_.get() + skip_, array_.data(), array_.nbytes());
    DeviceMemory::get().add(data(), array_.nbytes());
  }
  // Room for results, poisoned: every byte is 0xff, a NaN in every floating type.
  DeviceArray(const py::dtype& type, const Shape& shape, size_t offset = 0)
      : array_(type, shape),
        skip_(offset * array_.itemsize()),
        memory_(new char[skip_ + array_.nbytes()]) {
    std::memset(memory_.get() + skip_, 0xff, array_.nbytes());
    DeviceMemory::get().add(data(), array_.nbytes());
  }
  DeviceArray(const DeviceArray&) = delete;
  ~DeviceArray() { DeviceMemory::get().remove(data()); }

  void* data() const { return memory_.get() + skip_; }

  py::array numpy() const {
    py::array result(array_.dtype(), Shape(array_.shape(), array_.shape() + array_.ndim()));
    std::memcpy(result.mutable_data(), memory_.get() + skip_, array_.nbytes());
    return result;
  }

 private:
  py::array array_;
  size_t skip_;
  std::unique_ptr<char[]> memory_;
};

}  // namespace simt
