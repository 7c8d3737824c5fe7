#include <cuda_runtime.h>

#include "device.h"

namespace dlmone::cuda {

int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

std::pair<int, std::string> device_count() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    // A machine without a driver reports "insufficient driver", not "no device": every error
    // means that there is nothing to run on. Reading it clears it for later calls.
    cudaGetLastError();
    return {0, std::string(cudaGetErrorName(status)) + ": " + cudaGetErrorString(status)};
  }
  return {count, count > 0 ? "" : "the CUDA driver reports no device"};
}

}  // namespace dlmone::cuda
