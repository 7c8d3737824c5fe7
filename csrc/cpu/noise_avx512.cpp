#include "noise_tile.h"

#if defined(__x86_64__)

#define DLMONE_AVX512 __attribute__((target("avx512f,avx512dq,avx512vl")))

namespace dlmone::cpu {
namespace {

bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}

DLMONE_AVX512 void words(const NoiseDraw& draw, uint32_t first, uint32_t* out) {
  generic::words(draw, first, out);
}

DLMONE_AVX512 void normals(const NoiseDraw& draw, uint32_t first, float* out) {
  generic::normals(draw, first, out);
}

}  // namespace

const NoiseKernel kAvx512Noise = {"avx512", supported, words, normals};

}  // namespace dlmone::cpu

#endif
