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
  const void* packed = nullptr;  // what pack_vocabulary wrote for this table and path, or null
};

// Names of the paths this CPU runs, the fastest first.
std::vector<std::string> supported_paths();

// Bytes that pack_vocabulary writes for a path, and the alignment it needs.
int64_t packed_bytes(int64_t v, int64_t d, const std::string& path);
constexpr int64_t kPackedAlignment = 64;

// Writes to `packed` what a path would otherwise make of the table at every call: transposed
// panels of fp32 or of 8-bit integers, and half norms. Uses e, v, e_stride, d and threads.
void pack_vocabulary(const NearestToken& job, const std::string& path, void* packed);

// ids[i] = argmin_v |x_i - e_v|^2, with distances as computed in fp64 and the lowest id among
// equals. Distances that are not finite never win; a row without a finite one gets id 0.
// margins[i] = the second-lowest distance of row i minus the lowest: 0 for equals, infinite without
// a second finite distance, 0 without a first.
// `path` is a name from supported_paths(), or empty for the fastest that can read what it is given:
// paths of 8-bit integers read packed tables only.
// Throws std::invalid_argument when the path does not exist here or needs a packed table, and when
// the packed one is another's.
void nearest_token(const NearestToken& job, const std::string& path);

}  // namespace dlmone::cpu
