// One function per operation that adds it to the Python module. Nothing of torch is linked, so one
// build serves every torch version: tensors come in through DLPack (tensors.h), those on a GPU as
// raw addresses. The caller keeps them alive, and unchanged until the call returns: what was
// checked is read again without Python's lock.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace dlmone {

void bind_nearest_token(pybind11::module_& m);
void bind_noise(pybind11::module_& m);
#ifdef DLMONE_WITH_CUDA
void bind_cuda(pybind11::module_& m);
#endif

// pybind11 turns std::invalid_argument into ValueError.
inline void require(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

// A thread count that OpenMP can be asked for.
inline void check_threads(const char* op, int threads) {
  require(threads >= 1 && threads <= 1024,
          std::string(op) + ": threads must lie in [1, 1024], got " + std::to_string(threads));
}

}  // namespace dlmone
