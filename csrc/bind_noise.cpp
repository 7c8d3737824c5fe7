#include <algorithm>

#include "cpu/noise.h"
#include "tensors.h"

namespace py = pybind11;

namespace dlmone {
namespace {

constexpr const char* kOp = "noise";
constexpr int64_t kWords = int64_t{1} << 32;

void check(bool holds, const std::string& message) { require(holds, "noise: " + message); }

TensorView draws_of(const py::object& draws) {
  const TensorView view(kOp, "draws", draws, Element::kInteger, 2);
  return view.sized({view.size(0), 4}).contiguous();
}

cpu::Noise noise_of(const TensorView& draws, int64_t stream, int64_t positions, int64_t channels,
                    int threads) {
  check(stream >= 0 && stream < kWords,
        "stream must lie in [0, 2^32), got " + std::to_string(stream));
  check(positions <= kWords, "positions must lie in [0, 2^32]");
  check(channels >= 1 && channels <= kWords, "channels must lie in [1, 2^32]");
  check(positions * ((channels + 3) / 4) <= kWords, "positions and channels exceed the counter");
  check_threads(kOp, threads);
  return {draws.data<const int64_t>(),
          draws.size(0),
          static_cast<uint32_t>(stream),
          positions,
          channels,
          threads};
}

// [rows, positions, channels] to be written.
TensorView output_of(const py::object& out, const TensorView& draws) {
  const TensorView view(kOp, "out", out, Element::kFloat, 3);
  view.sized({draws.size(0), view.size(1), view.size(2)}).contiguous().apart_from(draws);
  return view;
}

void normal(const py::object& draws, int64_t stream, const py::object& out, int threads,
            const std::string& path) {
  const TensorView rows = draws_of(draws);
  const TensorView normals = output_of(out, rows);
  const cpu::Noise noise = noise_of(rows, stream, normals.size(1), normals.size(2), threads);
  const py::gil_scoped_release unlocked;
  cpu::normal(noise, normals.data<float>(), path);
}

void philox_words(const py::object& draws, int64_t stream, int64_t first, const py::object& out,
                  int threads, const std::string& path) {
  const TensorView rows = draws_of(draws);
  const TensorView words(kOp, "out", out, Element::kInteger, 3);
  const int64_t count = words.size(1);
  words.sized({rows.size(0), count, 4}).contiguous().apart_from(rows);
  check(first >= 0 && first <= kWords && count <= kWords - first,
        "first and count must lie in [0, 2^32]");
  const cpu::Noise noise = noise_of(rows, stream, 0, 1, threads);
  const py::gil_scoped_release unlocked;
  cpu::philox_words(noise, static_cast<uint32_t>(first), count, words.data<int64_t>(), path);
}

const float* factor_of(const char* name, const py::object& factor, const TensorView& out) {
  const TensorView view(kOp, name, factor, Element::kFloat, 1);
  out.apart_from(view.sized({out.size(0)}).contiguous());
  return view.data<const float>();
}

// The table's rows that x_0 is made of.
const int64_t* ids_of(const py::object& ids, const TensorView& out, int64_t vocabulary) {
  const TensorView view(kOp, "ids", ids, Element::kInteger, 2);
  out.apart_from(view.sized({out.size(0), out.size(1)}).contiguous());
  const auto* first = view.data<const int64_t>();
  const auto outside = [=](int64_t id) { return id < 0 || id >= vocabulary; };
  if (std::any_of(first, first + view.elements(), outside)) {
    view.refuse("must lie in [0, " + std::to_string(vocabulary) + "), the rows of x0");
  }
  return first;
}

const uint8_t* mask_of(const py::object& mask, const TensorView& out) {
  const TensorView view(kOp, "mask", mask, Element::kByte, 2);
  out.apart_from(view.sized({out.size(0), out.size(1)}).contiguous());
  return view.data<const uint8_t>();
}

void forward_diffusion(const py::object& draws, int64_t stream, const py::object& x0,
                       const py::object& ids, const py::object& alpha, const py::object& sigma,
                       const py::object& mask, const py::object& out, int threads,
                       const std::string& path) {
  const TensorView rows = draws_of(draws);
  const TensorView x_t = output_of(out, rows);
  const cpu::Noise noise = noise_of(rows, stream, x_t.size(1), x_t.size(2), threads);
  const bool is_table = !ids.is_none();
  const TensorView clean(kOp, "x0", x0, Element::kFloat, is_table ? 2 : 3);
  if (is_table) {
    clean.sized({clean.size(0), x_t.size(2)});
  } else {
    clean.sized({x_t.size(0), x_t.size(1), x_t.size(2)});
  }
  x_t.apart_from(clean.contiguous());
  const cpu::Diffusion diffusion = {clean.data<const float>(),
                                    is_table ? ids_of(ids, x_t, clean.size(0)) : nullptr,
                                    factor_of("alpha", alpha, x_t), factor_of("sigma", sigma, x_t),
                                    mask.is_none() ? nullptr : mask_of(mask, x_t)};
  const py::gil_scoped_release unlocked;
  cpu::forward_diffusion(noise, diffusion, x_t.data<float>(), path);
}

}  // namespace

void bind_noise(py::module_& m) {
  m.def("normal", &normal, py::arg("draws"), py::arg("stream"), py::arg("out"), py::arg("threads"),
        py::arg("path") = "",
        "Writes normals to out, fp32 [rows, positions, channels], drawn by draws, int64 [rows, 4] "
        "of (k0, k1, sample, step).");
  m.def("philox_words", &philox_words, py::arg("draws"), py::arg("stream"), py::arg("first"),
        py::arg("out"), py::arg("threads"), py::arg("path") = "",
        "Writes the words of counters first, first + 1, ... to out, int64 [rows, count, 4].");
  m.def("forward_diffusion", &forward_diffusion, py::arg("draws"), py::arg("stream"), py::arg("x0"),
        py::arg("ids"), py::arg("alpha"), py::arg("sigma"), py::arg("mask"), py::arg("out"),
        py::arg("threads"), py::arg("path") = "",
        "Writes alpha x0 + sigma noise where mask is not 0, or is None, and x0 elsewhere to out, "
        "fp32 [rows, positions, channels]; with ids [rows, positions] x0 is a table [v, channels] "
        "whose rows they name.");
}

}  // namespace dlmone
