// The emulator's own kernels, for Python. Without pybind11: its headers take longer to compile than
// all the rest of this module.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstring>
#include <memory>
#include <stdexcept>

#include "device_memory.h"
#include "selftest.h"

namespace {

// So many bytes of a device, and no more, so that AddressSanitizer sees the first one beyond.
class DeviceBytes {
 public:
  explicit DeviceBytes(size_t count) : bytes_(new char[count]) {
    simt::DeviceMemory::get().add(data(), count);
  }
  DeviceBytes(const DeviceBytes&) = delete;
  ~DeviceBytes() { simt::DeviceMemory::get().remove(data()); }

  char* data() const { return bytes_.get(); }

 private:
  std::unique_ptr<char[]> bytes_;
};

// launch(name, grid, block, shared, seed, x, count, n): the `count` bytes that the kernel gives; x
// is anything with a buffer, and may be empty where the kernel reads nothing.
PyObject* launch(PyObject*, PyObject* arguments) {
  const char* name;
  dim3 grid, block;
  Py_ssize_t shared, count;
  unsigned seed;
  Py_buffer x;
  int n;
  if (!PyArg_ParseTuple(arguments, "s(III)(III)nIy*ni", &name, &grid.x, &grid.y, &grid.z, &block.x,
                        &block.y, &block.z, &shared, &seed, &x, &count, &n)) {
    return nullptr;
  }
  PyObject* result = nullptr;
  try {
    const DeviceBytes in(x.len), out(count);
    std::memcpy(in.data(), x.buf, x.len);
    std::memset(out.data(), 0xff, count);  // a NaN in every floating type
    simt_test::launch(name, grid, block, shared, seed, in.data(), out.data(), n);
    result = PyBytes_FromStringAndSize(out.data(), count);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  PyBuffer_Release(&x);
  return result;
}

PyMethodDef methods[] = {{"launch", launch, METH_VARARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "simt_selftest",
                      nullptr,
                      -1,
                      methods,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_simt_selftest() { return PyModule_Create(&module); }
