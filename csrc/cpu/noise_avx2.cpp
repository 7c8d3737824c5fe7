#include "noise_tile.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define DLMONE_AVX2 __attribute__((target("avx2")))

namespace dlmone::cpu {
namespace {

bool supported() { return __builtin_cpu_supports("avx2"); }

// The low halves of the lanes, in order.
DLMONE_AVX2 inline void store(__m256i lanes, uint32_t* out) {
  const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
  const __m256i halves = _mm256_permutevar8x32_epi32(lanes, order);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(halves));
}

// A word to each 64-bit lane: one instruction gives both halves of a product. What lies above a
// word is left alone, as a product reads the low halves only.
DLMONE_AVX2 void philox(const NoiseDraw& draw, uint32_t first, uint32_t (*words)[kNoiseTile]) {
  const __m256i multiplier0 = _mm256_set1_epi64x(kMultiplier0);
  const __m256i multiplier1 = _mm256_set1_epi64x(kMultiplier1);
  const __m256i places = _mm256_set_epi64x(3, 2, 1, 0);
  for (int64_t j = 0; j < kNoiseTile; j += 4) {
    __m256i c0 = _mm256_set1_epi64x(draw.stream);
    __m256i c1 = _mm256_set1_epi64x(draw.sample);
    __m256i c2 = _mm256_set1_epi64x(draw.step);
    __m256i c3 = _mm256_add_epi64(_mm256_set1_epi64x(int64_t{first} + j), places);
    uint32_t k0 = draw.key[0], k1 = draw.key[1];
#pragma GCC unroll 10
    for (int round = 0; round < kRounds; ++round) {
      const __m256i product0 = _mm256_mul_epu32(c0, multiplier0);
      const __m256i product1 = _mm256_mul_epu32(c2, multiplier1);
      const __m256i high0 = _mm256_srli_epi64(product0, 32);
      const __m256i high1 = _mm256_srli_epi64(product1, 32);
      c0 = _mm256_xor_si256(_mm256_xor_si256(high1, c1), _mm256_set1_epi64x(k0));
      c2 = _mm256_xor_si256(_mm256_xor_si256(high0, c3), _mm256_set1_epi64x(k1));
      c1 = product1;
      c3 = product0;
      k0 += kWeyl0;
      k1 += kWeyl1;
    }
    store(c0, words[0] + j);
    store(c1, words[1] + j);
    store(c2, words[2] + j);
    store(c3, words[3] + j);
  }
}

DLMONE_AVX2 void words(const NoiseDraw& draw, uint32_t first, uint32_t* out) {
  uint32_t found[4][kNoiseTile];
  philox(draw, first, found);
  generic::interleave4(found, out);
}

DLMONE_AVX2 void normals(const NoiseDraw& draw, uint32_t first, float* out) {
  uint32_t found[4][kNoiseTile];
  philox(draw, first, found);
  generic::normals(found, out);
}

}  // namespace

const NoiseKernel kAvx2Noise = {"avx2", supported, words, normals};

}  // namespace dlmone::cpu

#endif
