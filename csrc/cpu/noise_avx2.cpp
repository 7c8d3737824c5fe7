#include "noise_tile.h"

#if defined(__x86_64__)

#define DLMONE_AVX2 __attribute__((target("avx2")))

namespace dlmone::cpu {
namespace {

bool supported() { return __builtin_cpu_supports("avx2"); }

DLMONE_AVX2 void words(const NoiseDraw& draw, uint32_t first, uint32_t* out) {
  generic::words(draw, first, out);
}

DLMONE_AVX2 void normals(const NoiseDraw& draw, uint32_t first, float* out) {
  generic::normals(draw, first, out);
}

}  // namespace

const NoiseKernel kAvx2Noise = {"avx2", supported, words, normals};

}  // namespace dlmone::cpu

#endif
