// The arithmetic of nearest-token rounding, one implementation per instruction set.
//
// A panel is kPanelRows consecutive vocabulary rows, transposed so that the lanes of a vector hold
// neighbouring ids. A tile is `tokens` rows of x, interleaved by channel. Score of a pair:
// half_norm(v) - <x, E_v>, which orders ids as the squared distance does.
#pragma once

#include <cstdint>

namespace dlmone::cpu {

constexpr int64_t kPanelRows = 64;

struct TileKernel {
  const char* name;
  bool (*supported)();
  int tokens;  // rows of x in one tile
  int lanes;   // ids handled together: a panel is stored as [kPanelRows / lanes][d][lanes]

  // half_norms[j] = |row j of the panel|^2 / 2.
  void (*half_norms)(const float* panel, int64_t d, float* half_norms);
  // smallest[t] = lowest score of tile token t over the panel's rows; NaN scores are ignored.
  void (*panel_min)(const float* tile, const float* panel, const float* half_norms, int64_t d,
                    float* smallest);
  // score = |e|^2 / 2 - <x, e> of one pair.
  float (*score)(const float* x, const float* e, int64_t d);
};

extern const TileKernel kPortableTiles;
#if defined(__x86_64__)
extern const TileKernel kAvx2Tiles;
extern const TileKernel kAvx512Tiles;
#endif

// Parts that the compiler vectorises by itself, inlined into each instruction set's functions.
namespace generic {

template <int kLanes>
__attribute__((always_inline)) inline void half_norms(const float* __restrict panel, int64_t d,
                                                      float* __restrict out) {
  for (int64_t first = 0; first < kPanelRows; first += kLanes) {
    float sums[kLanes] = {};
    for (int64_t k = 0; k < d; ++k, panel += kLanes) {
      for (int j = 0; j < kLanes; ++j) sums[j] += panel[j] * panel[j];
    }
    for (int j = 0; j < kLanes; ++j) out[first + j] = 0.5f * sums[j];
  }
}

__attribute__((always_inline)) inline float score(const float* __restrict x,
                                                  const float* __restrict e, int64_t d) {
  constexpr int kParts = 16;
  float sums[kParts] = {};
  int64_t k = 0;
  for (; k + kParts <= d; k += kParts) {
    for (int j = 0; j < kParts; ++j) sums[j] += e[k + j] * (0.5f * e[k + j] - x[k + j]);
  }
  float total = 0.0f;
  for (; k < d; ++k) total += e[k] * (0.5f * e[k] - x[k]);
  for (float sum : sums) total += sum;
  return total;
}

}  // namespace generic
}  // namespace dlmone::cpu
