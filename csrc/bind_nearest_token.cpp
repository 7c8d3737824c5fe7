#include <pybind11/stl.h>

#include <optional>

#include "cpu/nearest_token.h"
#include "tensors.h"

namespace py = pybind11;

namespace dlmone {
namespace {

constexpr const char* kOp = "nearest_token";

void check(bool holds, const std::string& message) { require(holds, "nearest_token: " + message); }

void check_table(int64_t v, int64_t d) {
  check(d >= 1 && d <= (int64_t{1} << 20), "d must lie in [1, 2^20], got " + std::to_string(d));
  check(v >= 1 && v <= (int64_t{1} << 40), "v must lie in [1, 2^40], got " + std::to_string(v));
}

int64_t packed_bytes(int64_t v, int64_t d, const std::string& path) {
  check_table(v, d);
  return cpu::packed_bytes(v, d, path);
}

TensorView table_of(const py::object& embedding) {
  const TensorView table(kOp, "embedding", embedding, Element::kFloat, 2);
  check_table(table.size(0), table.size(1));
  return table.with_dense_rows();
}

TensorView packed_of(const py::object& packed, const TensorView& table, const std::string& path) {
  const TensorView view(kOp, "packed", packed, Element::kByte, 1);
  view.sized({cpu::packed_bytes(table.size(0), table.size(1), path)});
  return view.contiguous().aligned(cpu::kPackedAlignment);
}

cpu::NearestToken job_of(const TensorView& table, int threads) {
  check_threads(kOp, threads);
  cpu::NearestToken job = {};
  job.e = table.data<const float>();
  job.v = table.size(0);
  job.e_stride = table.row_stride();
  job.d = table.size(1);
  job.threads = threads;
  return job;
}

void pack_vocabulary(const py::object& embedding, const py::object& packed, int threads,
                     const std::string& path) {
  const TensorView table = table_of(embedding);
  const TensorView out = packed_of(packed, table, path).apart_from(table);
  const cpu::NearestToken job = job_of(table, threads);
  const py::gil_scoped_release unlocked;
  cpu::pack_vocabulary(job, path, out.data<void>());
}

void nearest_token(const py::object& x, const py::object& embedding, const py::object& ids,
                   int threads, const std::string& path, const py::object& margins,
                   const py::object& packed) {
  const TensorView table = table_of(embedding);
  cpu::NearestToken job = job_of(table, threads);
  const TensorView rows(kOp, "x", x, Element::kFloat, 2);
  job.n = rows.size(0);
  rows.sized({job.n, job.d}).with_dense_rows();
  const TensorView found(kOp, "ids", ids, Element::kInteger, 1);
  found.sized({job.n}).contiguous().apart_from(rows).apart_from(table);
  job.x = rows.data<const float>();
  job.x_stride = rows.row_stride();
  job.ids = found.data<int64_t>();
  std::optional<TensorView> gaps;
  if (!margins.is_none()) {
    gaps.emplace(kOp, "margins", margins, Element::kFloat, 1);
    gaps->sized({job.n}).contiguous().apart_from(rows).apart_from(table).apart_from(found);
    job.margins = gaps->data<float>();
  }
  if (!packed.is_none()) {
    const TensorView made = packed_of(packed, table, path);
    found.apart_from(made);
    if (gaps) gaps->apart_from(made);
    job.packed = made.data<const void>();
  }
  const py::gil_scoped_release unlocked;
  cpu::nearest_token(job, path);
}

}  // namespace

void bind_nearest_token(py::module_& m) {
  m.def("cpu_paths", &cpu::supported_paths,
        "Instruction-set paths this CPU runs, the fastest first.");
  m.def("packed_bytes", &packed_bytes, py::arg("v"), py::arg("d"), py::arg("path"),
        "Size of a packed vocabulary for one path.");
  m.def("pack_vocabulary", &pack_vocabulary, py::arg("embedding"), py::arg("packed"),
        py::arg("threads"), py::arg("path"),
        "Writes what a path would otherwise make of the table at every call to `packed`, uint8 "
        "[packed_bytes], aligned to 64 bytes.");
  m.def("nearest_token", &nearest_token, py::arg("x"), py::arg("embedding"), py::arg("ids"),
        py::arg("threads"), py::arg("path") = "", py::arg("margins") = py::none(),
        py::arg("packed") = py::none(),
        "ids [n] = argmin_v |x_i - e_v|^2 for fp32 x [n, d] and embedding [v, d] with contiguous "
        "rows; with margins fp32 [n] also how much further the next id is.");
}

}  // namespace dlmone
