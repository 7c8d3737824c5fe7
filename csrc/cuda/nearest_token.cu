#include <stdexcept>
#include <string>

#include "nearest_token.h"
#include "warp.cuh"
// The kernels use what warp.cuh declares.
#include "nearest_token_launch.cuh"

namespace dlmone::cuda {
namespace {

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string("nearest_token: ") + what + ": " + cudaGetErrorName(status) +
                           " (" + cudaGetErrorString(status) + ")");
}

}  // namespace

int64_t nearest_token_workspace(int64_t n, int64_t v, int64_t d, int multiprocessors) {
  return lay_out(make_plan(n, v, d, multiprocessors), n).bytes;
}

void nearest_token(const NearestToken& job) {
  const auto stream = static_cast<cudaStream_t>(job.stream);
  run_nearest_token(
      job, [stream](auto* kernel, int blocks, int threads, int shared, const auto& argument) {
        if (shared > 0) {
          check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
                "shared memory");
        }
        kernel<<<blocks, threads, shared, stream>>>(argument);
        check(cudaGetLastError(), "launch");
      });
}

}  // namespace dlmone::cuda
