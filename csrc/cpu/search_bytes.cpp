// Search with 8-bit integers (AVX-512 VNNI) on a vocabulary that was packed once.
//
// x = sx * xq + dx and e = se * eq + de with integers in [-127, 127] and a scale for every row. The
// integer products are exact, so a score is off by at most |dx| |e - de| + |x| |de| and a few
// roundings; both losses are measured when the rows are stored. What is left unclear goes to the
// fp32 search.
#include "search.h"

#if defined(__x86_64__)

// GCC 12's own header trips these warnings (its "undefined" values initialise themselves).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#define DLMONE_VNNI __attribute__((target("avx512f,avx512vnni")))

namespace dlmone::cpu {
namespace {

constexpr int kTokens = 6;
constexpr int kVectors = kPanelRows / 16;
constexpr int64_t kOffset = 128;  // the instruction takes one operand unsigned: eq + 128
// Sums of 255 * 127 * d stay below 2^31.
constexpr int64_t kLargestWidth = int64_t{1} << 15;
// Rows outside this range would leave fp32's on the way.
constexpr float kSmallestScale = 1e-12f;
constexpr float kLargestScale = 1e12f;

int64_t groups_of_four(int64_t d) { return ceil_div(d, 4); }

// One panel: [groups of four channels][kPanelRows][4] bytes, half norms, scales.
int64_t record_bytes(int64_t d) {
  return kPanelRows * (4 * groups_of_four(d) + 2 * static_cast<int64_t>(sizeof(float)));
}

// A row in 8 bits: the scale, and the norms of what is stored and of what is lost.
struct Rounded {
  float scale = 0.0f;
  double kept = 0.0;
  double lost = 0.0;
  double norm = 0.0;
  bool finite = true;
  bool fits = true;
};

float largest_size(const float* row, int64_t d) {
  float largest = 0.0f;
  for (int64_t k = 0; k < d; ++k) {
    const float size = std::fabs(row[k]);
    if (!(size <= largest)) largest = size;  // NaN stays
    if (std::isnan(largest)) break;
  }
  return largest;
}

// Calls store(k, integer) for every channel; zeros where the row cannot be stored.
template <typename Store>
Rounded round_row(const float* row, int64_t d, const Store& store) {
  Rounded result;
  const float largest = largest_size(row, d);
  result.finite = std::isfinite(largest);
  result.fits =
      result.finite && (largest == 0.0f || (largest >= kSmallestScale && largest <= kLargestScale));
  if (!result.fits || largest == 0.0f) {
    for (int64_t k = 0; k < d; ++k) store(k, 0);
    return result;
  }
  result.scale = largest / 127.0f;
  const float inverse = 127.0f / largest;
  double kept = 0.0;
  double lost = 0.0;
  double whole = 0.0;
  for (int64_t k = 0; k < d; ++k) {
    const int integer = std::clamp(static_cast<int>(std::lrintf(row[k] * inverse)), -127, 127);
    const double value = static_cast<double>(result.scale) * integer;
    const double loss = row[k] - value;
    kept += value * value;
    lost += loss * loss;
    whole += static_cast<double>(row[k]) * row[k];
    store(k, integer);
  }
  result.kept = std::sqrt(kept);
  result.lost = std::sqrt(lost);
  result.norm = std::sqrt(whole);
  return result;
}

// acc += <four channels of e, the same four of x>. As an intrinsic, compilers copy the accumulator
// before every use and load x on its own.
DLMONE_VNNI inline __attribute__((always_inline)) void multiply_add(__m512i& acc, __m512i e,
                                                                    const int32_t* x) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(e), "m"(*x));
}

DLMONE_VNNI inline __attribute__((always_inline)) __m512 score_of(__m512i product, __m512 x_scale,
                                                                  const float* half_norms,
                                                                  const float* scales) {
  const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(product), x_scale);
  return _mm512_fnmadd_ps(scaled, _mm512_load_ps(scales), _mm512_load_ps(half_norms));
}

DLMONE_VNNI void panel_min(const int32_t* tile, const int32_t* sums, const float* x_scales,
                           const int8_t* panel, int64_t groups, float* smallest) {
  const auto* half_norms = reinterpret_cast<const float*>(panel + 4 * groups * kPanelRows);
  const float* scales = half_norms + kPanelRows;
  __m512i acc[kTokens][kVectors];
#pragma GCC unroll 6
  for (int t = 0; t < kTokens; ++t) {
    // What the offset of the unsigned operand adds.
#pragma GCC unroll 6
    for (int v = 0; v < kVectors; ++v) acc[t][v] = _mm512_set1_epi32(sums[t]);
  }
  const int8_t* e_groups = panel;
  for (int64_t k = 0; k < groups; ++k, tile += kTokens, e_groups += 4 * kPanelRows) {
    __m512i e[kVectors];
#pragma GCC unroll 6
    for (int v = 0; v < kVectors; ++v) e[v] = _mm512_load_si512(e_groups + 64 * v);
#pragma GCC unroll 6
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 6
      for (int v = 0; v < kVectors; ++v) multiply_add(acc[t][v], e[v], tile + t);
    }
  }
#pragma GCC unroll 6
  for (int t = 0; t < kTokens; ++t) {
    const __m512 x_scale = _mm512_set1_ps(x_scales[t]);
    __m512 lowest = score_of(acc[t][0], x_scale, half_norms, scales);
#pragma GCC unroll 6
    for (int v = 1; v < kVectors; ++v) {
      lowest =
          _mm512_min_ps(score_of(acc[t][v], x_scale, half_norms + 16 * v, scales + 16 * v), lowest);
    }
    smallest[t] = _mm512_reduce_min_ps(lowest);
  }
}

// The same scores, to the last bit, one by one for a single token of a tile.
DLMONE_VNNI void panel_scores(const int32_t* token, int32_t sum, float x_scale, const int8_t* panel,
                              int64_t groups, float* scores) {
  const auto* half_norms = reinterpret_cast<const float*>(panel + 4 * groups * kPanelRows);
  const float* scales = half_norms + kPanelRows;
  for (int v = 0; v < kVectors; ++v) {
    __m512i acc = _mm512_set1_epi32(sum);
    for (int64_t k = 0; k < groups; ++k) {
      multiply_add(acc, _mm512_load_si512(panel + 4 * kPanelRows * k + 64 * v),
                   token + k * kTokens);
    }
    _mm512_storeu_ps(scores + 16 * v,
                     score_of(acc, _mm512_set1_ps(x_scale), half_norms + 16 * v, scales + 16 * v));
  }
}

class BytesSearch final : public Search {
 public:
  explicit BytesSearch(const NearestToken& job)
      : Search(job, kTokens),
        groups_(groups_of_four(job.d)),
        header_(*static_cast<const PackedHeader*>(job.packed)),
        records_(reinterpret_cast<const int8_t*>(static_cast<const PackedHeader*>(job.packed) + 1)),
        tiles_data_(stride_ * groups_),
        sums_(stride_),
        scales_(stride_),
        errors_(stride_) {}

  bool coarse() const override { return true; }
  double error(int64_t token) const override { return errors_[token]; }

  void collect(int64_t token, int64_t panel, double limit,
               std::vector<Scored>& near) const override {
    float scores[kPanelRows];
    const int64_t tile = token / kTokens;
    const int32_t* data = tiles_data_.data() + tile * kTokens * groups_ + token % kTokens;
    panel_scores(data, sums_[token], scales_[token], record(panel), groups_, scores);
    const int64_t first = panel * kPanelRows;
    const int64_t rows = std::min(kPanelRows, job_.v - first);
    for (int64_t j = 0; j < rows; ++j) {
      if (scores[j] <= limit) near.push_back({first + j, scores[j]});
    }
  }

 private:
  const int8_t* record(int64_t panel) const { return records_ + panel * record_bytes(job_.d); }

  void prepare_tokens() override {
#pragma omp parallel for num_threads(job_.threads)
    for (int64_t tile = 0; tile < tiles_; ++tile) {
      auto* bytes = reinterpret_cast<int8_t*>(tiles_data_.data() + tile * kTokens * groups_);
      for (int64_t t = 0; t < kTokens; ++t) store_token(tile * kTokens + t, bytes + 4 * t);
    }
  }

  void store_token(int64_t token, int8_t* bytes) {
    if (token >= job_.n) return;  // the vector starts with zeros
    int32_t sum = 0;
    const Rounded rounded = round_row(x_row(token), job_.d, [&](int64_t k, int integer) {
      bytes[k / 4 * 4 * kTokens + k % 4] = static_cast<int8_t>(integer);
      sum += integer;
    });
    sums_[token] = -static_cast<int32_t>(kOffset) * sum;
    scales_[token] = rounded.scale;
    errors_[token] = rounded.fits ? bound(rounded) : std::numeric_limits<double>::infinity();
  }

  double bound(const Rounded& x) const {
    const double kept = header_.largest_norm;
    const double loss = header_.largest_loss;
    const double size = x.kept * kept + header_.largest_half_norm;
    // Eight roundings of relative size 2^-24, and one percent more for the sums in here.
    return 1.01 * (x.lost * kept + x.norm * loss + std::ldexp(size, -21)) + 1e-35 +
           fp64_rounding(x.norm, header_.largest_half_norm);
  }

  void search_panel(int64_t panel, int64_t first_tile, int64_t last_tile,
                    float* smallest) override {
    const int8_t* bytes = record(panel);
    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
      const int64_t token = tile * kTokens;
      panel_min(tiles_data_.data() + token * groups_, sums_.data() + token, scales_.data() + token,
                bytes, groups_, smallest + token);
    }
  }

  const int64_t groups_;
  const PackedHeader header_;
  const int8_t* records_;
  std::vector<int32_t> tiles_data_;  // [tiles][groups][kTokens], four channels each
  std::vector<int32_t> sums_;
  std::vector<float> scales_;
  std::vector<double> errors_;
};

struct Extremes {
  float half_norm = 0.0f;
  float norm = 0.0f;
  float loss = 0.0f;
  bool fits = true;
};

Extremes pack_panel(const NearestToken& job, int64_t panel, int8_t* record) {
  const int64_t groups = groups_of_four(job.d);
  auto* half_norms = reinterpret_cast<float*>(record + 4 * groups * kPanelRows);
  float* scales = half_norms + kPanelRows;
  std::fill_n(record, 4 * groups * kPanelRows, static_cast<int8_t>(kOffset));
  Extremes result;
  for (int64_t j = 0; j < kPanelRows; ++j) {
    const int64_t v = panel * kPanelRows + j;
    half_norms[j] = kInfinity;
    scales[j] = 0.0f;
    if (v >= job.v) continue;
    const Rounded row = round_row(job.e + v * job.e_stride, job.d, [&](int64_t k, int integer) {
      record[k / 4 * 4 * kPanelRows + 4 * j + k % 4] = static_cast<int8_t>(integer + kOffset);
    });
    // A row that is not finite has no finite distance: its score stays infinite.
    if (!row.finite) continue;
    result.fits = result.fits && row.fits;
    half_norms[j] = static_cast<float>(0.5 * row.norm * row.norm);
    scales[j] = row.scale;
    // Rounded up, away from what fp32 loses.
    constexpr double kUp = 1.0 + 1e-6;
    result.half_norm = std::max(result.half_norm, half_norms[j]);
    result.norm = std::max(result.norm, static_cast<float>(row.kept * kUp));
    result.loss = std::max(result.loss, static_cast<float>(row.lost * kUp));
  }
  return result;
}

}  // namespace

bool bytes_supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vnni");
}

std::unique_ptr<Search> make_bytes_search(const NearestToken& job) {
  if (!static_cast<const PackedHeader*>(job.packed)->fits) return nullptr;
  return std::make_unique<BytesSearch>(job);
}

int64_t bytes_packed_bytes(int64_t v, int64_t d) {
  if (d > kLargestWidth) return sizeof(PackedHeader);
  return static_cast<int64_t>(sizeof(PackedHeader)) + ceil_div(v, kPanelRows) * record_bytes(d);
}

void pack_bytes(const NearestToken& job, void* packed) {
  auto* header = static_cast<PackedHeader*>(packed);
  *header = {job.v, job.d, kBytesLayout, 0.0f, 0.0f, 0.0f, 0};
  if (job.d > kLargestWidth) return;
  auto* records = reinterpret_cast<int8_t*>(header + 1);
  const int64_t panels = ceil_div(job.v, kPanelRows);
  std::vector<Extremes> extremes(panels);
#pragma omp parallel for num_threads(job.threads)
  for (int64_t panel = 0; panel < panels; ++panel) {
    extremes[panel] = pack_panel(job, panel, records + panel * record_bytes(job.d));
  }
  header->fits = 1;
  for (const Extremes& each : extremes) {
    header->largest_half_norm = std::max(header->largest_half_norm, each.half_norm);
    header->largest_norm = std::max(header->largest_norm, each.norm);
    header->largest_loss = std::max(header->largest_loss, each.loss);
    header->fits = header->fits && each.fits;
  }
}

}  // namespace dlmone::cpu

#endif
