#include <pybind11/stl.h>

#include "bindings.h"
#include "cpu/nearest_token.h"

namespace py = pybind11;

namespace dlmone {
namespace {

void check(bool holds, const std::string& message) { require(holds, "nearest_token: " + message); }

void check_matrix(const char* name, std::uintptr_t address, int64_t rows, int64_t stride,
                  int64_t d) {
  const std::string label(name);
  check(rows >= 0, label + " has a negative number of rows: " + std::to_string(rows));
  check(rows == 0 || address != 0, label + " is a null pointer");
  check(address % alignof(float) == 0, label + " is not aligned to 4 bytes");
  check(stride >= 0, label + " has a negative row stride: " + std::to_string(stride));
  int64_t extent = 0;
  const bool overflows = __builtin_mul_overflow(rows, stride, &extent) ||
                         __builtin_add_overflow(extent, d, &extent) || extent > (int64_t{1} << 60);
  check(!overflows, label + " does not fit the address space");
}

void check_packed(std::uintptr_t packed) {
  check(packed % cpu::kPackedAlignment == 0,
        "packed is not aligned to " + std::to_string(cpu::kPackedAlignment) + " bytes");
}

void check_width(int64_t d) {
  check(d >= 1 && d <= (int64_t{1} << 20), "d must lie in [1, 2^20], got " + std::to_string(d));
}

int64_t packed_bytes(int64_t v, int64_t d, const std::string& path) {
  check_width(d);
  check(v >= 1 && v <= (int64_t{1} << 40), "v must lie in [1, 2^40], got " + std::to_string(v));
  return cpu::packed_bytes(v, d, path);
}

void pack_vocabulary(std::uintptr_t e, int64_t v, int64_t e_stride, int64_t d, int threads,
                     const std::string& path, std::uintptr_t packed, int64_t bytes) {
  check_width(d);
  check(v >= 1, "the vocabulary is empty");
  check_threads("nearest_token", threads);
  check_matrix("embedding", e, v, e_stride, d);
  check_packed(packed);
  check(packed != 0 && bytes == packed_bytes(v, d, path), "packed has the wrong size");
  cpu::NearestToken job = {};
  job.e = reinterpret_cast<const float*>(e);
  job.v = v;
  job.e_stride = e_stride;
  job.d = d;
  job.threads = threads;
  const py::gil_scoped_release unlocked;
  cpu::pack_vocabulary(job, path, reinterpret_cast<void*>(packed));
}

void nearest_token(std::uintptr_t x, int64_t n, int64_t x_stride, std::uintptr_t e, int64_t v,
                   int64_t e_stride, int64_t d, std::uintptr_t ids, int threads,
                   const std::string& path, std::uintptr_t margins, std::uintptr_t packed) {
  check_width(d);
  check(v >= 1, "the vocabulary is empty");
  check_threads("nearest_token", threads);
  check_matrix("x", x, n, x_stride, d);
  check_matrix("embedding", e, v, e_stride, d);
  check(n == 0 || (ids != 0 && ids % alignof(int64_t) == 0), "ids is a null or misaligned pointer");
  check(margins % alignof(float) == 0, "margins is a misaligned pointer");
  check_packed(packed);
  const cpu::NearestToken job = {reinterpret_cast<const float*>(x),
                                 n,
                                 x_stride,
                                 reinterpret_cast<const float*>(e),
                                 v,
                                 e_stride,
                                 d,
                                 reinterpret_cast<int64_t*>(ids),
                                 reinterpret_cast<float*>(margins),
                                 threads,
                                 reinterpret_cast<const void*>(packed)};
  const py::gil_scoped_release unlocked;
  cpu::nearest_token(job, path);
}

}  // namespace

void bind_nearest_token(py::module_& m) {
  m.def("cpu_paths", &cpu::supported_paths,
        "Instruction-set paths this CPU runs, the fastest first.");
  m.def("packed_bytes", &packed_bytes, py::arg("v"), py::arg("d"), py::arg("path"),
        "Size of a packed vocabulary for one path.");
  m.def("pack_vocabulary", &pack_vocabulary, py::arg("embedding"), py::arg("v"),
        py::arg("e_stride"), py::arg("d"), py::arg("threads"), py::arg("path"), py::arg("packed"),
        py::arg("bytes"),
        "Writes what a path would otherwise make of the table at every call to `packed`.");
  m.def("nearest_token", &nearest_token, py::arg("x"), py::arg("n"), py::arg("x_stride"),
        py::arg("embedding"), py::arg("v"), py::arg("e_stride"), py::arg("d"), py::arg("ids"),
        py::arg("threads"), py::arg("path") = "", py::arg("margins") = 0, py::arg("packed") = 0,
        "ids[i] = argmin_v |x_i - e_v|^2 for fp32 rows at the addresses x and embedding; with the "
        "address of n fp32 numbers in margins, also how much further the next id is.");
}

}  // namespace dlmone
