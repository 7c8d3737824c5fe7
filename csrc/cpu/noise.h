#pragma once

#include <cstdint>
#include <string>

namespace dlmone::cpu {

// What is drawn: for row i, key (k0, k1), sample and step are draws[4 i .. 4 i + 3], each below
// 2^32; position p and channel block b of it have the counter p * ceil(channels / 4) + b.
struct Noise {
  const int64_t* draws;  // [rows][4]
  int64_t rows;
  uint32_t stream;
  int64_t positions;
  int64_t channels;
  int threads;
};

// x_t = alpha x_0 + sigma noise, in fp32.
struct Diffusion {
  const float* x0;      // [rows][positions][channels], or the table [vocabulary][channels]
  const int64_t* ids;   // [rows][positions] rows of the table, or null where x0 is not a table
  const float* alpha;   // [rows]
  const float* sigma;   // [rows]
  const uint8_t* mask;  // [rows][positions], 0 = x_t is x_0 there; or null: noise everywhere
};

// `path` is a name from supported_paths(), or empty for the fastest; the bits written do not depend
// on it, nor on the number of threads. All throw std::invalid_argument for an unknown path.

// out [rows][positions][channels]: standard normals.
void normal(const Noise& noise, float* out, const std::string& path);

// out [rows][positions][channels] = x_t.
void forward_diffusion(const Noise& noise, const Diffusion& diffusion, float* out,
                       const std::string& path);

// out [rows][count][4]: the words of counters first, first + 1, ... below 2^32.
void philox_words(const Noise& noise, uint32_t first, int64_t count, int64_t* out,
                  const std::string& path);

}  // namespace dlmone::cpu
