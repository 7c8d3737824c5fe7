#ifdef DLMONE_WITH_CUDA

#include <pybind11/stl.h>

#include <utility>

#include "bindings.h"
#include "cuda/device.h"

namespace py = pybind11;

namespace dlmone {

void bind_cuda(py::module_& m) {
  m.def("cuda_runtime_version", &cuda::runtime_version, "For example 13000.");
  m.def(
      "cuda_device_count",
      [] {
        const auto [count, error] = cuda::device_count();
        return std::make_pair(count, error.empty() ? py::object(py::none()) : py::str(error));
      },
      "(number of devices, None or why there is none).");
}

}  // namespace dlmone

#endif
