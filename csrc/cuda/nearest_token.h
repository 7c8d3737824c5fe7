#pragma once

#include <cstdint>

namespace dlmone::cuda {

enum class Type : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Nearest-token rounding on one device. All addresses are device memory; strides count elements.
struct NearestToken {
  // What distances are measured with: x [n, d] and the embedding [v, d].
  const void* x;
  Type x_type;
  int64_t n;
  int64_t x_stride;
  const void* embedding;
  Type embedding_type;
  int64_t v;
  int64_t embedding_stride;
  int64_t d;
  // What is searched: 16-bit copies [n, padded], [v, padded] with zeros from column d on; padded is
  // d rounded up to a multiple of 16, rows begin at multiples of 16 bytes.
  const void* search_x;
  int64_t search_x_stride;
  const void* search_table;
  int64_t search_table_stride;
  Type search_type;
  const float* half_norms;  // |E_v|^2 / 2 of the embedding itself, fp32 [v]
  double operand_roundoff;  // largest relative change of an element by its 16-bit copy
  int64_t* ids;             // [n]
  float* margins;           // [n] or null
  void* workspace;          // workspace_bytes(...), 16-byte aligned, contents do not matter
  int multiprocessors;
  void* stream;
};

constexpr int64_t kLargestWidth = 256;

int64_t nearest_token_workspace(int64_t n, int64_t v, int64_t d, int multiprocessors);

// Puts the work on the stream and returns. Throws std::runtime_error if a launch is refused.
void nearest_token(const NearestToken& job);

}  // namespace dlmone::cuda
