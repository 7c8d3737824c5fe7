#ifdef DLMONE_WITH_CUDA

#include <pybind11/stl.h>

#include <utility>

#include "bindings.h"
#include "cuda/device.h"
#include "cuda/nearest_token.h"

namespace py = pybind11;

namespace dlmone {
namespace {

constexpr int64_t kMostRows = int64_t{1} << 30;

void check(bool holds, const std::string& message) {
  require(holds, "cuda_nearest_token: " + message);
}

void check_range(const char* name, int64_t value, int64_t lowest, int64_t highest) {
  check(value >= lowest && value <= highest,
        std::string(name) + " must lie in [" + std::to_string(lowest) + ", " +
            std::to_string(highest) + "], got " + std::to_string(value));
}

void check_shape(int64_t n, int64_t v, int64_t d, int multiprocessors) {
  check_range("n", n, 0, kMostRows);
  check_range("v", v, 1, kMostRows);
  check_range("d", d, 1, cuda::kLargestWidth);
  check_range("multiprocessors", multiprocessors, 1, 1 << 16);
}

void check_pointer(const std::string& name, std::uintptr_t address, std::uintptr_t alignment) {
  check(address != 0, name + " is a null pointer");
  check(address % alignment == 0,
        name + " is not aligned to " + std::to_string(alignment) + " bytes");
}

cuda::Type check_type(const char* name, int code) {
  check_range(name, code, 0, 2);
  return static_cast<cuda::Type>(code);
}

int64_t bytes_of(cuda::Type type) { return type == cuda::Type::kFloat32 ? 4 : 2; }

const void* check_matrix(const char* name, std::uintptr_t address, int64_t rows, int64_t stride,
                         int64_t alignment, int64_t element_bytes) {
  const std::string label(name);
  if (rows > 0) check_pointer(label, address, alignment);
  check(stride >= 0, label + " has a negative row stride: " + std::to_string(stride));
  // Also of no rows: the products below must not overflow.
  constexpr int64_t kMost = int64_t{1} << 58;
  int64_t extent = 0;
  check(stride <= kMost && !__builtin_mul_overflow(rows, stride, &extent) && extent <= kMost,
        label + " does not fit the address space");
  check(stride * element_bytes % alignment == 0,
        label + " has rows that are not aligned to " + std::to_string(alignment) + " bytes");
  return reinterpret_cast<const void*>(address);
}

int64_t workspace_bytes(int64_t n, int64_t v, int64_t d, int multiprocessors) {
  check_shape(n, v, d, multiprocessors);
  return cuda::nearest_token_workspace(n, v, d, multiprocessors);
}

void nearest_token(int64_t n, int64_t v, int64_t d, std::uintptr_t x, int x_type, int64_t x_stride,
                   std::uintptr_t embedding, int embedding_type, int64_t embedding_stride,
                   std::uintptr_t search_x, int64_t search_x_stride, std::uintptr_t search_table,
                   int64_t search_table_stride, int search_type, std::uintptr_t half_norms,
                   double operand_roundoff, std::uintptr_t ids, std::uintptr_t margins,
                   std::uintptr_t workspace, int64_t workspace_size, int multiprocessors,
                   std::uintptr_t stream) {
  check_shape(n, v, d, multiprocessors);
  cuda::NearestToken job{};
  job.n = n;
  job.v = v;
  job.d = d;
  job.x_type = check_type("x_type", x_type);
  job.embedding_type = check_type("embedding_type", embedding_type);
  job.search_type = check_type("search_type", search_type);
  check(job.search_type != cuda::Type::kFloat32, "search_type must be a 16-bit type");
  const int64_t x_bytes = bytes_of(job.x_type), e_bytes = bytes_of(job.embedding_type);
  job.x = check_matrix("x", x, n, x_stride, x_bytes, x_bytes);
  job.x_stride = x_stride;
  job.embedding = check_matrix("embedding", embedding, v, embedding_stride, e_bytes, e_bytes);
  job.embedding_stride = embedding_stride;
  job.search_x = check_matrix("search_x", search_x, n, search_x_stride, 16, 2);
  job.search_x_stride = search_x_stride;
  job.search_table = check_matrix("search_table", search_table, v, search_table_stride, 16, 2);
  job.search_table_stride = search_table_stride;
  check_pointer("half_norms", half_norms, alignof(float));
  job.half_norms = reinterpret_cast<const float*>(half_norms);
  check(operand_roundoff >= 0.0 && operand_roundoff < 1.0, "operand_roundoff must lie in [0, 1)");
  job.operand_roundoff = operand_roundoff;
  if (n > 0) check_pointer("ids", ids, alignof(int64_t));
  job.ids = reinterpret_cast<int64_t*>(ids);
  check(margins % alignof(float) == 0, "margins is a misaligned pointer");
  job.margins = reinterpret_cast<float*>(margins);
  const int64_t needed = cuda::nearest_token_workspace(n, v, d, multiprocessors);
  if (n > 0) check_pointer("workspace", workspace, 16);
  check(workspace_size >= needed, "workspace needs " + std::to_string(needed) + " bytes, got " +
                                      std::to_string(workspace_size));
  job.workspace = reinterpret_cast<void*>(workspace);
  job.multiprocessors = multiprocessors;
  job.stream = reinterpret_cast<void*>(stream);
  const py::gil_scoped_release unlocked;
  cuda::nearest_token(job);
}

void bind_nearest_token_launch(py::module_& m) {
  m.def("cuda_nearest_token_workspace", &workspace_bytes, py::arg("n"), py::arg("v"), py::arg("d"),
        py::arg("multiprocessors"), "Bytes of device memory that cuda_nearest_token works in.");
  m.def("cuda_nearest_token", &nearest_token, py::kw_only(), py::arg("n"), py::arg("v"),
        py::arg("d"), py::arg("x"), py::arg("x_type"), py::arg("x_stride"), py::arg("embedding"),
        py::arg("embedding_type"), py::arg("embedding_stride"), py::arg("search_x"),
        py::arg("search_x_stride"), py::arg("search_table"), py::arg("search_table_stride"),
        py::arg("search_type"), py::arg("half_norms"), py::arg("operand_roundoff"), py::arg("ids"),
        py::arg("margins"), py::arg("workspace"), py::arg("workspace_bytes"),
        py::arg("multiprocessors"), py::arg("stream"),
        "ids[i] = argmin_v |x_i - e_v|^2 on the current device, for rows at device addresses. "
        "Types: 0 fp32, 1 fp16, 2 bf16. Returns when the work is on the stream.");
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("cuda_runtime_version", &cuda::runtime_version, "For example 13000.");
  m.def(
      "cuda_device_count",
      [] {
        const auto [count, error] = cuda::device_count();
        return std::make_pair(count, error.empty() ? py::object(py::none()) : py::str(error));
      },
      "(number of devices, None or why there is none).");
  bind_nearest_token_launch(m);
}

}  // namespace dlmone

#endif
