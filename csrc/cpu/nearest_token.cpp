// Nearest-token rounding in two phases, for at most kChunk tokens at a time:
//
// 1. search: each thread transposes panels of the vocabulary into its cache and keeps, for every
//    token, only the lowest fp32 score of the panel. Nothing of size tokens x vocabulary exists.
// 2. decide: fp32 scores carry an error of at most B, so the answer lies among the ids whose score
//    is within 2 B of the lowest. Only panels that reach that limit are scored again; a single id
//    below the limit is the answer, several are compared by their fp64 distances. With margins the
//    limit starts from the second-lowest score, and the two lowest distances are kept.
//
// The result does not depend on the number of threads or on the instruction set.
#include "nearest_token.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "packing.h"
#include "tiles.h"

namespace dlmone::cpu {
namespace {

constexpr int64_t kChunk = 1024;
constexpr int64_t kSpan = 64;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

std::vector<const TileKernel*> supported_kernels() {
  std::vector<const TileKernel*> kernels;
#if defined(__x86_64__)
  for (const TileKernel* kernel : {&kAvx512Tiles, &kAvx2Tiles}) {
    if (kernel->supported()) kernels.push_back(kernel);
  }
#endif
  kernels.push_back(&kPortableTiles);
  return kernels;
}

const TileKernel& choose_kernel(const std::string& path) {
  for (const TileKernel* kernel : supported_kernels()) {
    if (path.empty() || path == kernel->name) return *kernel;
  }
  throw std::invalid_argument("nearest_token: this CPU has no path '" + path + "'");
}

// Squares summed by folding halves onto each other: an order that any device can follow.
double squared_distance(const float* x, const float* e, int64_t d, int64_t width, double* scratch) {
  for (int64_t k = 0; k < d; ++k) {
    const double difference = static_cast<double>(x[k]) - static_cast<double>(e[k]);
    scratch[k] = difference * difference;
  }
  std::fill(scratch + d, scratch + width, 0.0);
  for (int64_t half = width / 2; half > 0; half /= 2) {
    for (int64_t k = 0; k < half; ++k) scratch[k] += scratch[k + half];
  }
  return scratch[0];
}

double norm(const float* x, int64_t d) {
  double sum = 0.0;
  for (int64_t k = 0; k < d; ++k) sum += static_cast<double>(x[k]) * x[k];
  return std::sqrt(sum);
}

// One chunk of tokens on its way through the two phases.
class Chunk {
 public:
  Chunk(const NearestToken& job, const TileKernel& kernel)
      : job_(job),
        kernel_(kernel),
        panels_(ceil_div(job.v, kPanelRows)),
        tiles_(ceil_div(job.n, kernel.tokens)),
        stride_(tiles_ * kernel.tokens),
        width_(power_of_two(job.d)),
        x_tiles_(stride_ * job.d),
        panel_buffers_(job.threads * kPanelRows * (job.d + 1)),
        smallest_(panels_ * stride_),
        largest_half_norm_(panels_, 0.0f),
        fp64_scratch_(job.threads * width_) {}

  void run() {
    search();
    decide();
  }

 private:
  struct Choice {
    int64_t id = -1;
    double distance = -1.0;  // negative: not measured, because nothing competed with `id` yet
  };

  struct TwoLowest {
    int64_t id = -1;
    double lowest = std::numeric_limits<double>::infinity();
    double second = std::numeric_limits<double>::infinity();

    // Ids come in rising order, so only a smaller distance replaces the choice.
    void consider(int64_t v, double distance) {
      if (distance < lowest) {
        second = lowest;
        lowest = distance;
        id = v;
      } else {
        second = std::min(second, distance);
      }
    }
  };

  struct Scored {
    int64_t id;
    float score;
  };

  static int64_t power_of_two(int64_t d) {
    int64_t width = 1;
    while (width < d) width *= 2;
    return width;
  }

  const float* x_row(int64_t i) const { return job_.x + i * job_.x_stride; }
  const float* e_row(int64_t v) const { return job_.e + v * job_.e_stride; }

  void search() {
    for (int64_t tile = 0; tile < tiles_; ++tile) {
      const int64_t first = tile * kernel_.tokens;
      interleave(x_row(first), job_.x_stride, job_.n - first, job_.d, kernel_.tokens,
                 x_tiles_.get() + first * job_.d);
    }
    // A vocabulary with fewer panels than threads is shared out by groups of tiles as well.
    const int64_t groups = std::min(tiles_, ceil_div(job_.threads, panels_));
    const int64_t tiles_per_group = ceil_div(tiles_, groups);
#pragma omp parallel for schedule(static) num_threads(job_.threads)
    for (int64_t item = 0; item < panels_ * groups; ++item) {
      const int64_t first = item % groups * tiles_per_group;
      search_panel(item / groups, first, std::min(tiles_, first + tiles_per_group));
    }
  }

  void search_panel(int64_t panel, int64_t first_tile, int64_t last_tile) {
    float* packed = panel_buffers_.get() + thread_index() * kPanelRows * (job_.d + 1);
    float* half_norms = packed + kPanelRows * job_.d;
    pack_panel(panel, packed);
    kernel_.half_norms(packed, job_.d, half_norms);
    if (first_tile == 0) {
      for (int64_t j = 0; j < kPanelRows; ++j) {
        largest_half_norm_[panel] = std::max(largest_half_norm_[panel], half_norms[j]);
      }
    }
    const int64_t rows = std::min(kPanelRows, job_.v - panel * kPanelRows);
    std::fill(half_norms + rows, half_norms + kPanelRows, kInfinity);
    float* smallest = smallest_.get() + panel * stride_;
    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
      const int64_t token = tile * kernel_.tokens;
      kernel_.panel_min(x_tiles_.get() + token * job_.d, packed, half_norms, job_.d,
                        smallest + token);
    }
  }

  // The place for a vocabulary that was packed once per model: its panel would be returned here.
  void pack_panel(int64_t panel, float* packed) const {
    for (int64_t j = 0; j < kPanelRows; j += kernel_.lanes) {
      const int64_t row = panel * kPanelRows + j;
      if (row + kernel_.lanes <= job_.v) {
        interleave_fast(e_row(row), job_.e_stride, job_.d, kernel_.lanes, packed + j * job_.d);
      } else {
        interleave(e_row(row), job_.e_stride, job_.v - row, job_.d, kernel_.lanes,
                   packed + j * job_.d);
      }
    }
  }

  void decide() {
    const double half = *std::max_element(largest_half_norm_.begin(), largest_half_norm_.end());
#pragma omp parallel for schedule(dynamic) num_threads(job_.threads)
    for (int64_t first = 0; first < job_.n; first += kSpan) {
      const int64_t last = std::min(job_.n, first + kSpan);
      job_.margins ? measure_span(first, last, half) : decide_span(first, last, half);
    }
  }

  void decide_span(int64_t first, int64_t last, double largest_half_norm) {
    const int64_t count = last - first;
    float lowest[kSpan];
    std::fill_n(lowest, kSpan, kInfinity);
    for (int64_t panel = 0; panel < panels_; ++panel) {
      const float* scores = smallest_.get() + panel * stride_ + first;
      for (int64_t i = 0; i < count; ++i) lowest[i] = std::min(lowest[i], scores[i]);
    }
    double limit[kSpan];
    Choice choice[kSpan];
    for (int64_t i = 0; i < count; ++i) {
      limit[i] = lowest[i] + 2.0 * score_error(x_row(first + i), largest_half_norm);
      // Beyond fp32's range the scores say nothing: compare every id in fp64 instead.
      if (!std::isfinite(limit[i])) {
        choice[i].id = scan(first + i);
        limit[i] = -std::numeric_limits<double>::infinity();
      }
    }
    for (int64_t panel = 0; panel < panels_; ++panel) {
      const float* scores = smallest_.get() + panel * stride_ + first;
      for (int64_t i = 0; i < count; ++i) {
        if (scores[i] <= limit[i]) consider_panel(panel, first + i, limit[i], choice[i]);
      }
    }
    for (int64_t i = 0; i < count; ++i) job_.ids[first + i] = choice[i].id;
  }

  // decide_span with margins. The lowest scores of two panels belong to two ids, so the two lowest
  // distances have scores within 2 B of the second.
  void measure_span(int64_t first, int64_t last, double largest_half_norm) {
    std::vector<Scored> near;
    for (int64_t token = first; token < last; ++token) {
      float lowest = kInfinity;
      float second = kInfinity;
      for (int64_t panel = 0; panel < panels_; ++panel) {
        const float score = smallest_.get()[panel * stride_ + token];
        second = std::min(second, std::max(lowest, score));
        lowest = std::min(lowest, score);
      }
      const double error = 2.0 * score_error(x_row(token), largest_half_norm);
      TwoLowest found;
      if (std::isfinite(lowest + error)) {
        collect(token, second + error, near);
        const double limit = second_score(near) + error;
        for (const Scored& each : near) {
          if (each.score <= limit) found.consider(each.id, distance(x_row(token), each.id));
        }
      } else {
        for (int64_t v = 0; v < job_.v; ++v) found.consider(v, distance(x_row(token), v));
      }
      job_.ids[token] = std::max(found.id, int64_t{0});
      job_.margins[token] = found.id < 0 ? 0.0f : static_cast<float>(found.second - found.lowest);
    }
  }

  // Ids in rising order whose score is at most `limit`, from the panels that reach it.
  void collect(int64_t token, double limit, std::vector<Scored>& near) const {
    near.clear();
    for (int64_t panel = 0; panel < panels_; ++panel) {
      if (!(smallest_.get()[panel * stride_ + token] <= limit)) continue;
      const int64_t first = panel * kPanelRows;
      const int64_t last = std::min(job_.v, first + kPanelRows);
      for (int64_t v = first; v < last; ++v) {
        const float score = kernel_.score(x_row(token), e_row(v), job_.d);
        if (score <= limit) near.push_back({v, score});
      }
    }
  }

  static float second_score(const std::vector<Scored>& near) {
    float lowest = kInfinity;
    float second = kInfinity;
    for (const Scored& each : near) {
      second = std::min(second, std::max(lowest, each.score));
      lowest = std::min(lowest, each.score);
    }
    return second;
  }

  // Bound on |fp32 score - exact score| for any order of summation: (d + 4) roundings, each of
  // relative size 2^-24, of terms whose sizes add up to at most |x| |e| + |e|^2 / 2. Underflow
  // adds less than the smallest normal number for every term. Infinite beyond fp32's range.
  double score_error(const float* x, double largest_half_norm) const {
    // The half norms are rounded themselves; one percent more covers that and the sums here.
    const double half = 1.01 * largest_half_norm;
    const double size = norm(x, job_.d) * std::sqrt(2.0 * half) + half;
    if (!(size < 1e37)) return std::numeric_limits<double>::infinity();
    const double roundings = std::ldexp(static_cast<double>(job_.d + 4), -24);
    return 1.01 * roundings / (1.0 - roundings) * size + std::ldexp(job_.d + 4.0, -125);
  }

  void consider_panel(int64_t panel, int64_t token, double limit, Choice& choice) {
    const float* x = x_row(token);
    const int64_t first = panel * kPanelRows;
    const int64_t last = std::min(job_.v, first + kPanelRows);
    for (int64_t v = first; v < last; ++v) {
      if (kernel_.score(x, e_row(v), job_.d) <= limit) consider(x, v, choice);
    }
  }

  // Ids come in rising order, so only a smaller distance replaces the choice.
  void consider(const float* x, int64_t v, Choice& choice) {
    if (choice.id < 0) {
      choice.id = v;
      return;
    }
    if (choice.distance < 0.0) choice.distance = distance(x, choice.id);
    const double candidate = distance(x, v);
    if (candidate < choice.distance) choice = {v, candidate};
  }

  int64_t scan(int64_t token) {
    int64_t id = 0;
    double smallest = std::numeric_limits<double>::infinity();
    for (int64_t v = 0; v < job_.v; ++v) {
      const double candidate = distance(x_row(token), v);
      if (candidate < smallest) {
        smallest = candidate;
        id = v;
      }
    }
    return id;
  }

  double distance(const float* x, int64_t v) {
    double* scratch = fp64_scratch_.data() + thread_index() * width_;
    return squared_distance(x, e_row(v), job_.d, width_, scratch);
  }

  const NearestToken& job_;
  const TileKernel& kernel_;
  const int64_t panels_;
  const int64_t tiles_;
  const int64_t stride_;  // tokens of the chunk, rounded up to whole tiles
  const int64_t width_;   // d rounded up to a power of two
  const Buffer x_tiles_;
  const Buffer panel_buffers_;
  const Buffer smallest_;  // [panels][stride]
  std::vector<float> largest_half_norm_;
  std::vector<double> fp64_scratch_;
};

}  // namespace

std::vector<std::string> supported_paths() {
  std::vector<std::string> names;
  for (const TileKernel* kernel : supported_kernels()) names.emplace_back(kernel->name);
  return names;
}

void nearest_token(const NearestToken& job, const std::string& path) {
  const TileKernel& kernel = choose_kernel(path);
  for (int64_t first = 0; first < job.n; first += kChunk) {
    NearestToken part = job;
    part.x += first * job.x_stride;
    part.ids += first;
    if (part.margins != nullptr) part.margins += first;
    part.n = std::min(kChunk, job.n - first);
    Chunk(part, kernel).run();
  }
}

}  // namespace dlmone::cpu
