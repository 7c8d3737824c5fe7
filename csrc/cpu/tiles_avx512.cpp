#include "tiles.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <limits>

#define DLMONE_AVX512 __attribute__((target("avx512f")))

namespace dlmone::cpu {
namespace {

// 6 x 4 accumulators of 16 lanes: 24 of the 32 registers, and 10 loads for 24 multiply-adds.
constexpr int kTokens = 6;
constexpr int kLanes = 64;
constexpr int kVectors = kLanes / 16;

bool supported() { return __builtin_cpu_supports("avx512f"); }

DLMONE_AVX512 void half_norms(const float* panel, int64_t d, float* out) {
  generic::half_norms<kLanes>(panel, d, out);
}

DLMONE_AVX512 float score(const float* x, const float* e, int64_t d) {
  return generic::score(x, e, d);
}

DLMONE_AVX512 void panel_min(const float* tile, const float* panel, const float* half_norms,
                             int64_t d, float* smallest) {
  __m512 dot[kTokens][kVectors];
  for (auto& row : dot) {
    for (auto& vector : row) vector = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < d; ++k, tile += kTokens, panel += kLanes) {
    __m512 e[kVectors];
    for (int v = 0; v < kVectors; ++v) e[v] = _mm512_load_ps(panel + 16 * v);
    for (int t = 0; t < kTokens; ++t) {
      const __m512 x = _mm512_set1_ps(tile[t]);
      for (int v = 0; v < kVectors; ++v) dot[t][v] = _mm512_fmadd_ps(x, e[v], dot[t][v]);
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    __m512 lowest = _mm512_set1_ps(std::numeric_limits<float>::infinity());
    for (int v = 0; v < kVectors; ++v) {
      const __m512 scores = _mm512_sub_ps(_mm512_load_ps(half_norms + 16 * v), dot[t][v]);
      // The instruction returns its second operand when either is NaN.
      lowest = _mm512_min_ps(scores, lowest);
    }
    smallest[t] = _mm512_reduce_min_ps(lowest);
  }
}

}  // namespace

const TileKernel kAvx512Tiles = {"avx512",   supported, kTokens, kLanes,
                                 half_norms, panel_min, score};

}  // namespace dlmone::cpu

#endif
