#include "bindings.h"
#include "cpu/noise.h"

namespace py = pybind11;

namespace dlmone {
namespace {

constexpr int64_t kWords = int64_t{1} << 32;

void check(bool holds, const std::string& message) { require(holds, "noise: " + message); }

void check_pointer(const char* name, std::uintptr_t address, std::size_t alignment, bool needed) {
  check(!needed || address != 0, std::string(name) + " is a null pointer");
  check(address % alignment == 0, std::string(name) + " is a misaligned pointer");
}

cpu::Noise checked(std::uintptr_t draws, int64_t rows, int64_t stream, int64_t positions,
                   int64_t channels, int threads) {
  check(rows >= 0, "rows is negative: " + std::to_string(rows));
  check_pointer("draws", draws, alignof(int64_t), rows > 0);
  check(stream >= 0 && stream < kWords,
        "stream must lie in [0, 2^32), got " + std::to_string(stream));
  check(positions >= 0 && positions <= kWords, "positions must lie in [0, 2^32]");
  check(channels >= 1 && channels <= kWords, "channels must lie in [1, 2^32]");
  check(positions * ((channels + 3) / 4) <= kWords, "positions and channels exceed the counter");
  check_threads("noise", threads);
  return {reinterpret_cast<const int64_t*>(draws),
          rows,
          static_cast<uint32_t>(stream),
          positions,
          channels,
          threads};
}

bool writes(const cpu::Noise& noise) { return noise.rows > 0 && noise.positions > 0; }

void normal(std::uintptr_t draws, int64_t rows, int64_t stream, int64_t positions, int64_t channels,
            std::uintptr_t out, int threads, const std::string& path) {
  const cpu::Noise noise = checked(draws, rows, stream, positions, channels, threads);
  check_pointer("out", out, alignof(float), writes(noise));
  const py::gil_scoped_release unlocked;
  cpu::normal(noise, reinterpret_cast<float*>(out), path);
}

void philox_words(std::uintptr_t draws, int64_t rows, int64_t stream, int64_t first, int64_t count,
                  std::uintptr_t out, int threads, const std::string& path) {
  const cpu::Noise noise = checked(draws, rows, stream, 0, 1, threads);
  check(first >= 0 && count >= 0 && first <= kWords && count <= kWords - first,
        "first and count must lie in [0, 2^32]");
  check_pointer("out", out, alignof(int64_t), rows > 0 && count > 0);
  const py::gil_scoped_release unlocked;
  cpu::philox_words(noise, static_cast<uint32_t>(first), count, reinterpret_cast<int64_t*>(out),
                    path);
}

void forward_diffusion(std::uintptr_t draws, int64_t rows, int64_t stream, int64_t positions,
                       int64_t channels, std::uintptr_t x0, std::uintptr_t ids,
                       std::uintptr_t alpha, std::uintptr_t sigma, std::uintptr_t mask,
                       std::uintptr_t out, int threads, const std::string& path) {
  const cpu::Noise noise = checked(draws, rows, stream, positions, channels, threads);
  check_pointer("x0", x0, alignof(float), writes(noise));
  check_pointer("ids", ids, alignof(int64_t), false);
  check_pointer("alpha", alpha, alignof(float), writes(noise));
  check_pointer("sigma", sigma, alignof(float), writes(noise));
  check_pointer("out", out, alignof(float), writes(noise));
  const cpu::Diffusion diffusion = {
      reinterpret_cast<const float*>(x0), reinterpret_cast<const int64_t*>(ids),
      reinterpret_cast<const float*>(alpha), reinterpret_cast<const float*>(sigma),
      reinterpret_cast<const uint8_t*>(mask)};
  const py::gil_scoped_release unlocked;
  cpu::forward_diffusion(noise, diffusion, reinterpret_cast<float*>(out), path);
}

}  // namespace

void bind_noise(py::module_& m) {
  m.def("normal", &normal, py::arg("draws"), py::arg("rows"), py::arg("stream"),
        py::arg("positions"), py::arg("channels"), py::arg("out"), py::arg("threads"),
        py::arg("path") = "",
        "fp32 normals [rows, positions, channels] at the address out, drawn by the int64 "
        "[rows, 4] (k0, k1, sample, step) at the address draws.");
  m.def("philox_words", &philox_words, py::arg("draws"), py::arg("rows"), py::arg("stream"),
        py::arg("first"), py::arg("count"), py::arg("out"), py::arg("threads"),
        py::arg("path") = "",
        "int64 [rows, count, 4] at the address out: the words of counters first, first + 1, ...");
  m.def("forward_diffusion", &forward_diffusion, py::arg("draws"), py::arg("rows"),
        py::arg("stream"), py::arg("positions"), py::arg("channels"), py::arg("x0"), py::arg("ids"),
        py::arg("alpha"), py::arg("sigma"), py::arg("mask"), py::arg("out"), py::arg("threads"),
        py::arg("path") = "",
        "fp32 alpha x0 + sigma noise where mask is not 0, x0 elsewhere; with ids, x0 is a table "
        "whose rows they name (they must lie inside it).");
}

}  // namespace dlmone
