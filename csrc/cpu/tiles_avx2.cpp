#include "tiles.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <limits>

#define DLMONE_AVX2 __attribute__((target("avx2,fma")))

namespace dlmone::cpu {
namespace {

// 6 x 2 accumulators of 8 lanes: 12 of the 16 registers, two for the panel, one for x.
constexpr int kTokens = 6;
constexpr int kLanes = 16;

bool supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

DLMONE_AVX2 void half_norms(const float* panel, int64_t d, float* out) {
  generic::half_norms<kLanes>(panel, d, out);
}

DLMONE_AVX2 float score(const float* x, const float* e, int64_t d) {
  return generic::score(x, e, d);
}

DLMONE_AVX2 float reduce_min(__m256 values) {
  const __m128 low = _mm256_castps256_ps128(values);
  const __m128 four = _mm_min_ps(low, _mm256_extractf128_ps(values, 1));
  const __m128 two = _mm_min_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_min_ss(two, _mm_movehdup_ps(two)));
}

DLMONE_AVX2 void strip_min(const float* tile, const float* strip, const float* half_norms,
                           int64_t d, float* smallest) {
  __m256 dot[kTokens][2];
  for (auto& row : dot) row[0] = row[1] = _mm256_setzero_ps();
  for (int64_t k = 0; k < d; ++k, tile += kTokens, strip += kLanes) {
    const __m256 e0 = _mm256_load_ps(strip);
    const __m256 e1 = _mm256_load_ps(strip + 8);
    for (int t = 0; t < kTokens; ++t) {
      const __m256 x = _mm256_broadcast_ss(tile + t);
      dot[t][0] = _mm256_fmadd_ps(x, e0, dot[t][0]);
      dot[t][1] = _mm256_fmadd_ps(x, e1, dot[t][1]);
    }
  }
  const __m256 infinity = _mm256_set1_ps(std::numeric_limits<float>::infinity());
  for (int t = 0; t < kTokens; ++t) {
    // The instruction returns its second operand when either is NaN.
    __m256 lowest = _mm256_min_ps(_mm256_sub_ps(_mm256_load_ps(half_norms), dot[t][0]), infinity);
    lowest = _mm256_min_ps(_mm256_sub_ps(_mm256_load_ps(half_norms + 8), dot[t][1]), lowest);
    smallest[t] = std::min(smallest[t], reduce_min(lowest));
  }
}

DLMONE_AVX2 void panel_min(const float* tile, const float* panel, const float* half_norms,
                           int64_t d, float* smallest) {
  std::fill_n(smallest, kTokens, std::numeric_limits<float>::infinity());
  for (int64_t first = 0; first < kPanelRows; first += kLanes) {
    strip_min(tile, panel + first * d, half_norms + first, d, smallest);
  }
}

}  // namespace

const TileKernel kAvx2Tiles = {"avx2", supported, kTokens, kLanes, half_norms, panel_min, score};

}  // namespace dlmone::cpu

#endif
