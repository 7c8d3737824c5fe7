// The arithmetic of counter-based normals, one implementation per instruction set.
//
// Philox 4x32-10 (Salmon et al., SC 2011), then Box and Muller (1958) in fp64, rounded once to
// fp32. Every value is computed by the same IEEE operations in the same order whatever the
// instruction set (plain multiplies and adds, no contraction), so all of them give the same bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace dlmone::cpu {

// Counters handled together: their words and normals stay in the first-level cache.
constexpr int64_t kNoiseTile = 64;

// Everything in key and counter but the last counter word.
struct NoiseDraw {
  uint32_t key[2];
  uint32_t stream;
  uint32_t sample;
  uint32_t step;
};

struct NoiseKernel {
  const char* name;
  bool (*supported)();
  // The four words of counters first, first + 1, ...: out [kNoiseTile][4].
  void (*words)(const NoiseDraw& draw, uint32_t first, uint32_t* out);
  // Their normals, four channels each: out [kNoiseTile][4].
  void (*normals)(const NoiseDraw& draw, uint32_t first, float* out);
};

extern const NoiseKernel kPortableNoise;
#if defined(__x86_64__)
extern const NoiseKernel kAvx2Noise;
extern const NoiseKernel kAvx512Noise;
#endif

constexpr uint32_t kMultiplier0 = 0xD2511F53u;
constexpr uint32_t kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kWeyl0 = 0x9E3779B9u;
constexpr uint32_t kWeyl1 = 0xBB67AE85u;
constexpr int kRounds = 10;

// Loops of a fixed length that the compiler vectorises by itself, inlined into each instruction
// set's functions.
namespace generic {

#define DLMONE_INLINE __attribute__((always_inline)) inline

DLMONE_INLINE void philox(const NoiseDraw& draw, uint32_t first, uint32_t (*words)[kNoiseTile]) {
  for (int64_t j = 0; j < kNoiseTile; ++j) {
    uint32_t c0 = draw.stream, c1 = draw.sample, c2 = draw.step;
    uint32_t c3 = first + static_cast<uint32_t>(j);
    uint32_t k0 = draw.key[0], k1 = draw.key[1];
#pragma GCC unroll 10
    for (int round = 0; round < kRounds; ++round) {
      const uint64_t product0 = uint64_t{kMultiplier0} * c0;
      const uint64_t product1 = uint64_t{kMultiplier1} * c2;
      c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
      c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
      c1 = static_cast<uint32_t>(product1);
      c3 = static_cast<uint32_t>(product0);
      k0 += kWeyl0;
      k1 += kWeyl1;
    }
    words[0][j] = c0;
    words[1][j] = c1;
    words[2][j] = c2;
    words[3][j] = c3;
  }
}

DLMONE_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

DLMONE_INLINE float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

DLMONE_INLINE float unit_interval(uint32_t word) {
  return static_cast<float>(word) * 0x1p-32f + 0x1p-33f;
}

// ln u for u in (0, 1], a normal fp32 number: u = 2^k m with m in [sqrt(1/2), sqrt(2)), s =
// (m - 1) / (m + 1), ln m = 2 s + s^3 p(s^2). The polynomial's relative error is below 1e-17 of
// the result; no cancellation, as k ln 2 and ln m have opposite signs only where |ln m| is small.
DLMONE_INLINE double log_of(float u) {
  const uint32_t bits = bits_of(u);
  const int32_t k = static_cast<int32_t>(bits - 0x3F3504F3u) >> 23;
  const double f = static_cast<double>(from_bits(bits - (static_cast<uint32_t>(k) << 23))) - 1.0;
  const double s = f / (f + 2.0);
  const double z = s * s;
  double p = 0x1.2b5900de53b32p-3;
  p = p * z + 0x1.39fe51a7c18f9p-3;
  p = p * z + 0x1.7462b51cb66b1p-3;
  p = p * z + 0x1.c71c62e3f11e6p-3;
  p = p * z + 0x1.2492492df281ap-2;
  p = p * z + 0x1.99999999952d7p-2;
  p = p * z + 0x1.5555555555558p-1;
  return static_cast<double>(k) * 0x1.62e42fefa39efp-1 + (2.0 * s + s * z * p);
}

// sin(pi r / 2) for |r| <= 1/2 (and the next few numbers), z = r^2; relative error 4e-18.
DLMONE_INLINE double sine(double r, double z) {
  double p = 0x1.e3f3768c3c049p-25;
  p = p * z + -0x1.e300718bdf382p-19;
  p = p * z + 0x1.50782fd9ee232p-13;
  p = p * z + -0x1.32d2cce2e58f5p-8;
  p = p * z + 0x1.466bc677587f6p-4;
  p = p * z + -0x1.4abbce625be41p-1;
  p = p * z + 0x1.921fb54442d18p+0;
  return r * p;
}

// cos(pi r / 2), z = r^2, on the same range; relative error 2e-19.
DLMONE_INLINE double cosine(double z) {
  double p = -0x1.b2f3e0c262e31p-28;
  p = p * z + 0x1.f9ce24407528ap-22;
  p = p * z + -0x1.a6d1eef45ce0dp-16;
  p = p * z + 0x1.e1f5068688bacp-11;
  p = p * z + -0x1.55d3c7e3cb240p-6;
  p = p * z + 0x1.03c1f081b5ac0p-2;
  p = p * z + -0x1.3bd3cc9be45dep+0;
  return 1.0 + z * p;
}

// first[j] = sqrt(-2 ln u) cos(2 pi v), second[j] = sqrt(-2 ln u) sin(2 pi v).
DLMONE_INLINE void box_muller(const uint32_t* __restrict radius_words,
                              const uint32_t* __restrict angle_words, float* __restrict first,
                              float* __restrict second) {
  for (int64_t j = 0; j < kNoiseTile; ++j) {
    const double radius = std::sqrt(-2.0 * log_of(unit_interval(radius_words[j])));
    // 4 v = quarter + r exactly: quarter turns are exact, and nothing is lost near them.
    const float turns = 4.0f * unit_interval(angle_words[j]);
    const int32_t quarter = static_cast<int32_t>(turns + 0.5f);
    const double r = static_cast<double>(turns) - static_cast<double>(quarter);
    const double z = r * r;
    const uint32_t along = bits_of(static_cast<float>(radius * cosine(z)));
    const uint32_t across = bits_of(static_cast<float>(radius * sine(r, z)));
    const uint32_t q = static_cast<uint32_t>(quarter);
    // All ones for an odd quarter, where sine and cosine change places.
    const uint32_t odd = 0u - (q & 1u);
    const uint32_t swapped = (along ^ across) & odd;
    first[j] = from_bits((along ^ swapped) ^ (((q + 1u) & 2u) << 30));
    second[j] = from_bits((across ^ swapped) ^ ((q & 2u) << 30));
  }
}

template <typename T>
DLMONE_INLINE void interleave4(const T (*__restrict from)[kNoiseTile], T* __restrict out) {
  for (int64_t j = 0; j < kNoiseTile; ++j) {
    out[4 * j] = from[0][j];
    out[4 * j + 1] = from[1][j];
    out[4 * j + 2] = from[2][j];
    out[4 * j + 3] = from[3][j];
  }
}

DLMONE_INLINE void normals(const uint32_t (*words)[kNoiseTile], float* out) {
  float values[4][kNoiseTile];
  box_muller(words[0], words[1], values[0], values[1]);
  box_muller(words[2], words[3], values[2], values[3]);
  interleave4(values, out);
}

#undef DLMONE_INLINE

}  // namespace generic
}  // namespace dlmone::cpu
