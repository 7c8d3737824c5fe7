#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace dlmone::cpu {

// x [n, d] and e [v, d] are fp32 with unit stride along d; strides count elements between rows.
struct NearestToken {
  const float* x;
  int64_t n;
  int64_t x_stride;
  const float* e;
  int64_t v;
  int64_t e_stride;
  int64_t d;
  int64_t* ids;    // [n], written
  float* margins;  // [n], written, or null
  int threads;
};

// Names of the instruction-set paths this CPU runs, the fastest first.
std::vector<std::string> supported_paths();

// ids[i] = argmin_v |x_i - e_v|^2, with distances as computed in fp64 and the lowest id among
// equals. Distances that are not finite never win; a row without a finite one gets id 0.
// margins[i] = the second-lowest distance of row i minus the lowest: 0 for equals, infinite without
// a second finite distance, 0 without a first.
// `path` is a name from supported_paths(), or empty for the fastest.
// Throws std::invalid_argument when the path does not exist here.
void nearest_token(const NearestToken& job, const std::string& path);

}  // namespace dlmone::cpu
