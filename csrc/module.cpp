#include "bindings.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native operations of dlmone_fast; use them through dlmone_fast.kernels.";
  dlmone::bind_nearest_token(m);
  dlmone::bind_noise(m);
#ifdef DLMONE_WITH_CUDA
  m.attr("built_with_cuda") = true;
  dlmone::bind_cuda(m);
#else
  m.attr("built_with_cuda") = false;
#endif
}
