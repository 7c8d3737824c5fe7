#include <algorithm>
#include <limits>

#include "tiles.h"

namespace dlmone::cpu {
namespace {

// Four-lane vectors exist on every 64-bit CPU this builds for (SSE2, NEON); the compiler lowers
// them to scalars elsewhere.
using Vector = float __attribute__((vector_size(16)));

constexpr int kTokens = 4;
constexpr int kLanes = 8;

bool supported() { return true; }

void half_norms(const float* panel, int64_t d, float* out) {
  generic::half_norms<kLanes>(panel, d, out);
}

float score(const float* x, const float* e, int64_t d) { return generic::score(x, e, d); }

void strip_min(const float* tile, const float* strip, const float* half_norms, int64_t d,
               float* smallest) {
  Vector dot[kTokens][2] = {};
  for (int64_t k = 0; k < d; ++k, tile += kTokens, strip += kLanes) {
    const Vector e0 = {strip[0], strip[1], strip[2], strip[3]};
    const Vector e1 = {strip[4], strip[5], strip[6], strip[7]};
    for (int t = 0; t < kTokens; ++t) {
      dot[t][0] += tile[t] * e0;
      dot[t][1] += tile[t] * e1;
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int j = 0; j < kLanes; ++j) {
      const float score = half_norms[j] - dot[t][j / 4][j % 4];
      // A NaN score compares false and is ignored.
      if (score < smallest[t]) smallest[t] = score;
    }
  }
}

void panel_min(const float* tile, const float* panel, const float* half_norms, int64_t d,
               float* smallest) {
  std::fill_n(smallest, kTokens, std::numeric_limits<float>::infinity());
  for (int64_t first = 0; first < kPanelRows; first += kLanes) {
    strip_min(tile, panel + first * d, half_norms + first, d, smallest);
  }
}

}  // namespace

const TileKernel kPortableTiles = {"portable", supported, kTokens, kLanes,
                                   half_norms, panel_min, score};

}  // namespace dlmone::cpu
