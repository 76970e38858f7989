// The emulator's own kernels, for Python.
#include "bindings.h"
#include "selftest.h"

namespace py = pybind11;

PYBIND11_MODULE(simt_selftest, m) {
  // The output, of the dtype of x; x may be empty where the kernel reads nothing.
  m.def("launch", [](const std::string& name, simt::Shape grid, simt::Shape block, size_t shared,
                     unsigned seed, const py::array& x, simt::Shape shape, int n) {
    const simt::DeviceArray in(x), out(x.dtype(), shape);
    simt_test::launch(name, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]),
                      shared, seed, in.data(), out.data(), n);
    return out.numpy();
  });
}
