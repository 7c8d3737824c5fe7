// Search with fp32 scores, on panels that are packed at every call or were packed once.
#include "packing.h"
#include "search.h"

namespace dlmone::cpu {
namespace {

// One panel: [kPanelRows / lanes][d][lanes] and the half norms, infinite beyond the vocabulary.
int64_t record_size(int64_t d) { return kPanelRows * (d + 1); }

// Returns the largest half norm. NaN is ignored.
float pack_panel(const NearestToken& job, const TileKernel& kernel, int64_t panel, float* record) {
  const int64_t first = panel * kPanelRows;
  for (int64_t j = 0; j < kPanelRows; j += kernel.lanes) {
    const int64_t row = first + j;
    const float* from = job.e + row * job.e_stride;
    float* to = record + j * job.d;
    if (row + kernel.lanes <= job.v) {
      interleave_fast(from, job.e_stride, job.d, kernel.lanes, to);
    } else {
      interleave(from, job.e_stride, job.v - row, job.d, kernel.lanes, to);
    }
  }
  float* half_norms = record + kPanelRows * job.d;
  kernel.half_norms(record, job.d, half_norms);
  float largest = 0.0f;
  for (int64_t j = 0; j < kPanelRows; ++j) largest = std::max(largest, half_norms[j]);
  const int64_t rows = std::min(kPanelRows, job.v - first);
  std::fill(half_norms + rows, half_norms + kPanelRows, kInfinity);
  return largest;
}

class FloatSearch final : public Search {
 public:
  FloatSearch(const NearestToken& job, const TileKernel& kernel)
      : Search(job, kernel.tokens),
        kernel_(kernel),
        packed_(static_cast<const PackedHeader*>(job.packed)),
        x_tiles_(stride_ * job.d),
        panel_buffers_(packed_ ? 0 : job.threads * record_size(job.d)),
        panel_largest_(packed_ ? 0 : panels_, 0.0f),
        largest_half_norm_(packed_ ? packed_->largest_half_norm : 0.0f) {}

  bool coarse() const override { return false; }

  // (d + 4) roundings, each of relative size 2^-24 and in any order, of terms whose sizes add up to
  // at most |x| |e| + |e|^2 / 2. Underflow adds less than the smallest normal number for every
  // term. Infinite beyond fp32's range.
  double error(int64_t token) const override {
    // The half norms are rounded themselves; one percent more covers that and the sums here.
    const double half = 1.01 * largest_half_norm_;
    const double x_norm = norm(x_row(token), job_.d);
    const double size = x_norm * std::sqrt(2.0 * half) + half;
    if (!(size < 1e37)) return std::numeric_limits<double>::infinity();
    const double roundings = std::ldexp(static_cast<double>(job_.d + 4), -24);
    return 1.01 * roundings / (1.0 - roundings) * size + std::ldexp(job_.d + 4.0, -125) +
           fp64_rounding(x_norm, half);
  }

  void collect(int64_t token, int64_t panel, double limit,
               std::vector<Scored>& near) const override {
    const int64_t first = panel * kPanelRows;
    const int64_t last = std::min(job_.v, first + kPanelRows);
    for (int64_t v = first; v < last; ++v) {
      const float score = kernel_.score(x_row(token), e_row(v), job_.d);
      if (score <= limit) near.push_back({v, score});
    }
  }

 private:
  void prepare_tokens() override {
    for (int64_t tile = 0; tile < tiles_; ++tile) {
      const int64_t first = tile * tokens_;
      interleave(x_row(first), job_.x_stride, job_.n - first, job_.d, tokens_,
                 x_tiles_.get() + first * job_.d);
    }
  }

  void search_panel(int64_t panel, int64_t first_tile, int64_t last_tile,
                    float* smallest) override {
    const float* record = panel_record(panel, first_tile == 0);
    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
      const int64_t token = tile * tokens_;
      kernel_.panel_min(x_tiles_.get() + token * job_.d, record, record + kPanelRows * job_.d,
                        job_.d, smallest + token);
    }
  }

  void finish() override {
    for (const float each : panel_largest_) {
      largest_half_norm_ = std::max(largest_half_norm_, each);
    }
  }

  const float* panel_record(int64_t panel, bool first_reader) {
    if (packed_) return reinterpret_cast<const float*>(packed_ + 1) + panel * record_size(job_.d);
    float* record = panel_buffers_.get() + thread_index() * record_size(job_.d);
    const float largest = pack_panel(job_, kernel_, panel, record);
    if (first_reader) panel_largest_[panel] = largest;
    return record;
  }

  const TileKernel& kernel_;
  const PackedHeader* packed_;
  const Buffer x_tiles_;
  const Buffer panel_buffers_;
  std::vector<float> panel_largest_;
  float largest_half_norm_;
};

}  // namespace

std::unique_ptr<Search> make_float_search(const NearestToken& job, const TileKernel& kernel) {
  return std::make_unique<FloatSearch>(job, kernel);
}

int64_t float_packed_bytes(int64_t v, int64_t d) {
  return static_cast<int64_t>(sizeof(PackedHeader)) +
         ceil_div(v, kPanelRows) * record_size(d) * static_cast<int64_t>(sizeof(float));
}

void pack_floats(const NearestToken& job, const TileKernel& kernel, void* packed) {
  auto* header = static_cast<PackedHeader*>(packed);
  auto* records = reinterpret_cast<float*>(header + 1);
  float largest = 0.0f;
  const int64_t panels = ceil_div(job.v, kPanelRows);
#pragma omp parallel for num_threads(job.threads) reduction(max : largest)
  for (int64_t panel = 0; panel < panels; ++panel) {
    largest =
        std::max(largest, pack_panel(job, kernel, panel, records + panel * record_size(job.d)));
  }
  *header = {job.v, job.d, kernel.lanes, largest, 0.0f, 0.0f, 1};
}

}  // namespace dlmone::cpu
