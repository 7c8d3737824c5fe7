#include "noise_tile.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define DLMONE_AVX512 __attribute__((target("avx512f,avx512dq,avx512vl")))

namespace dlmone::cpu {
namespace {

bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}

// The low halves of the lanes, in order.
DLMONE_AVX512 inline void store(__m512i lanes, uint32_t* out) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi64_epi32(lanes));
}

// A word to each 64-bit lane: one instruction gives both halves of a product. What lies above a
// word is left alone, as a product reads the low halves only.
DLMONE_AVX512 void philox(const NoiseDraw& draw, uint32_t first, uint32_t (*words)[kNoiseTile]) {
  const __m512i multiplier0 = _mm512_set1_epi64(kMultiplier0);
  const __m512i multiplier1 = _mm512_set1_epi64(kMultiplier1);
  const __m512i places = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
  for (int64_t j = 0; j < kNoiseTile; j += 8) {
    __m512i c0 = _mm512_set1_epi64(draw.stream);
    __m512i c1 = _mm512_set1_epi64(draw.sample);
    __m512i c2 = _mm512_set1_epi64(draw.step);
    __m512i c3 = _mm512_add_epi64(_mm512_set1_epi64(int64_t{first} + j), places);
    uint32_t k0 = draw.key[0], k1 = draw.key[1];
#pragma GCC unroll 10
    for (int round = 0; round < kRounds; ++round) {
      const __m512i product0 = _mm512_mul_epu32(c0, multiplier0);
      const __m512i product1 = _mm512_mul_epu32(c2, multiplier1);
      const __m512i high0 = _mm512_srli_epi64(product0, 32);
      const __m512i high1 = _mm512_srli_epi64(product1, 32);
      c0 = _mm512_ternarylogic_epi64(high1, c1, _mm512_set1_epi64(k0), 0x96);
      c2 = _mm512_ternarylogic_epi64(high0, c3, _mm512_set1_epi64(k1), 0x96);
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

DLMONE_AVX512 void words(const NoiseDraw& draw, uint32_t first, uint32_t* out) {
  uint32_t found[4][kNoiseTile];
  philox(draw, first, found);
  generic::interleave4(found, out);
}

DLMONE_AVX512 void normals(const NoiseDraw& draw, uint32_t first, float* out) {
  uint32_t found[4][kNoiseTile];
  philox(draw, first, found);
  generic::normals(found, out);
}

}  // namespace

const NoiseKernel kAvx512Noise = {"avx512", supported, words, normals};

}  // namespace dlmone::cpu

#endif
