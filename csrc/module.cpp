// Python bindings: raw addresses in, nothing of torch, so one build serves every torch version.
// The Python side owns the tensors and keeps them alive during the call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "cpu/nearest_token.h"
#ifdef DLMONE_WITH_CUDA
#include "cuda/device.h"
#endif

namespace py = pybind11;

namespace {

// pybind11 turns std::invalid_argument into ValueError.
void require(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument("nearest_token: " + message);
}

void check_matrix(const char* name, std::uintptr_t address, int64_t rows, int64_t stride,
                  int64_t d) {
  const std::string label(name);
  require(rows >= 0, label + " has a negative number of rows: " + std::to_string(rows));
  require(rows == 0 || address != 0, label + " is a null pointer");
  require(address % alignof(float) == 0, label + " is not aligned to 4 bytes");
  require(stride >= 0, label + " has a negative row stride: " + std::to_string(stride));
  int64_t extent = 0;
  const bool overflows = __builtin_mul_overflow(rows, stride, &extent) ||
                         __builtin_add_overflow(extent, d, &extent) || extent > (int64_t{1} << 60);
  require(!overflows, label + " does not fit the address space");
}

void nearest_token(std::uintptr_t x, int64_t n, int64_t x_stride, std::uintptr_t e, int64_t v,
                   int64_t e_stride, int64_t d, std::uintptr_t ids, int threads,
                   const std::string& path, std::uintptr_t margins) {
  require(d >= 1 && d <= (int64_t{1} << 20), "d must lie in [1, 2^20], got " + std::to_string(d));
  require(v >= 1, "the vocabulary is empty");
  require(threads >= 1 && threads <= 1024,
          "threads must lie in [1, 1024], got " + std::to_string(threads));
  check_matrix("x", x, n, x_stride, d);
  check_matrix("embedding", e, v, e_stride, d);
  require(n == 0 || (ids != 0 && ids % alignof(int64_t) == 0),
          "ids is a null or misaligned pointer");
  require(margins % alignof(float) == 0, "margins is a misaligned pointer");
  const dlmone::cpu::NearestToken job = {reinterpret_cast<const float*>(x),
                                         n,
                                         x_stride,
                                         reinterpret_cast<const float*>(e),
                                         v,
                                         e_stride,
                                         d,
                                         reinterpret_cast<int64_t*>(ids),
                                         reinterpret_cast<float*>(margins),
                                         threads};
  const py::gil_scoped_release unlocked;
  dlmone::cpu::nearest_token(job, path);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native operations of dlmone_fast; use them through dlmone_fast.kernels.";
  m.def("cpu_paths", &dlmone::cpu::supported_paths,
        "Instruction-set paths this CPU runs, the fastest first.");
  m.def("nearest_token", &nearest_token, py::arg("x"), py::arg("n"), py::arg("x_stride"),
        py::arg("embedding"), py::arg("v"), py::arg("e_stride"), py::arg("d"), py::arg("ids"),
        py::arg("threads"), py::arg("path") = "", py::arg("margins") = 0,
        "ids[i] = argmin_v |x_i - e_v|^2 for fp32 rows at the addresses x and embedding; with the "
        "address of n fp32 numbers in margins, also how much further the next id is.");
#ifdef DLMONE_WITH_CUDA
  m.attr("built_with_cuda") = true;
  m.def("cuda_runtime_version", &dlmone::cuda::runtime_version, "For example 13000.");
  m.def(
      "cuda_device_count",
      [] {
        const auto [count, error] = dlmone::cuda::device_count();
        return std::make_pair(count, error.empty() ? py::object(py::none()) : py::str(error));
      },
      "(number of devices, None or why there is none).");
#else
  m.attr("built_with_cuda") = false;
#endif
}
