// Nearest-token rounding in two phases, for at most kChunk tokens at a time:
//
// 1. search: each thread takes panels of the vocabulary and keeps, for every token, only the lowest
//    score of the panel. Nothing of size tokens x vocabulary exists.
// 2. decide: scores carry an error of at most B, so the answer lies among the ids whose score is
//    within 2 B of the lowest. Only panels that reach that limit are scored again; a single id
//    below the limit is the answer, several are compared by their fp64 distances. With margins the
//    limit starts from the second-lowest score, and the two lowest distances are kept.
//
// The result does not depend on the number of threads, on the search or on the instruction set.
#include "nearest_token.h"

#include <stdexcept>

#include "packing.h"
#include "search.h"

namespace dlmone::cpu {
namespace {

constexpr int64_t kChunk = 1024;
constexpr int64_t kSpan = 64;
// Panels that a coarse search may leave open before a token is worth an exacter one.
constexpr size_t kPatience = 64;

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

bool on_bytes(const std::string& path) {
#if defined(__x86_64__)
  return path == kBytesName && bytes_supported();
#else
  (void)path;
  return false;
#endif
}

std::unique_ptr<Search> make_search(const NearestToken& job, const std::string& path) {
#if defined(__x86_64__)
  if (on_bytes(path)) {
    if (auto search = make_bytes_search(job)) return search;
    NearestToken unpacked = job;
    unpacked.packed = nullptr;
    return make_float_search(unpacked, choose_kernel(""));
  }
#endif
  return make_float_search(job, choose_kernel(path));
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

// One chunk of tokens on its way through the two phases.
class Chunk {
 public:
  Chunk(const NearestToken& job, Search& search)
      : job_(job),
        search_(search),
        stride_(search.stride()),
        width_(power_of_two(job.d)),
        smallest_(search.panels() * stride_) {}

  // Returns the tokens that the search left too unclear to decide here.
  std::vector<int64_t> run() {
    search_.run(smallest_.get());
    std::vector<std::vector<int64_t>> left(ceil_div(job_.n, kSpan));
#pragma omp parallel for schedule(dynamic) num_threads(job_.threads)
    for (int64_t span = 0; span < static_cast<int64_t>(left.size()); ++span) {
      decide_span(span * kSpan, std::min(job_.n, (span + 1) * kSpan), left[span]);
    }
    std::vector<int64_t> all;
    for (const auto& part : left) all.insert(all.end(), part.begin(), part.end());
    return all;
  }

 private:
  static int64_t power_of_two(int64_t d) {
    int64_t width = 1;
    while (width < d) width *= 2;
    return width;
  }

  void decide_span(int64_t first, int64_t last, std::vector<int64_t>& left) const {
    const int64_t count = last - first;
    float lowest[kSpan];
    float second[kSpan];
    std::fill_n(lowest, kSpan, kInfinity);
    std::fill_n(second, kSpan, kInfinity);
    for (int64_t panel = 0; panel < search_.panels(); ++panel) {
      const float* scores = smallest_.get() + panel * stride_ + first;
      for (int64_t i = 0; i < count; ++i) {
        second[i] = std::min(second[i], std::max(lowest[i], scores[i]));
        lowest[i] = std::min(lowest[i], scores[i]);
      }
    }
    double error[kSpan];
    double limit[kSpan];
    bool clear[kSpan];
    for (int64_t i = 0; i < count; ++i) {
      error[i] = 2.0 * search_.error(first + i);
      clear[i] = std::isfinite(lowest[i] + error[i]);
      // The lowest scores of two panels belong to two ids, so the two lowest distances have scores
      // within 2 B of the second.
      limit[i] = (job_.margins ? second[i] : lowest[i]) + error[i];
      if (!clear[i]) limit[i] = -std::numeric_limits<double>::infinity();
    }
    std::vector<int64_t> open[kSpan];
    for (int64_t panel = 0; panel < search_.panels(); ++panel) {
      const float* scores = smallest_.get() + panel * stride_ + first;
      for (int64_t i = 0; i < count; ++i) {
        if (scores[i] <= limit[i]) open[i].push_back(panel);
      }
    }
    std::vector<Scored> near;
    std::vector<double> scratch(width_);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t token = first + i;
      if (search_.coarse() && (!clear[i] || open[i].size() > kPatience)) {
        left.push_back(token);
      } else if (clear[i]) {
        near.clear();
        for (const int64_t panel : open[i]) search_.collect(token, panel, limit[i], near);
        decide(token, near, error[i], scratch.data());
      } else {
        // Beyond fp32's range the scores say nothing: compare every id in fp64 instead.
        TwoLowest found;
        for (int64_t v = 0; v < job_.v; ++v) measure(token, v, scratch.data(), found);
        write(token, found);
      }
    }
  }

  void decide(int64_t token, const std::vector<Scored>& near, double error, double* scratch) const {
    float lowest = kInfinity;
    float second = kInfinity;
    for (const Scored& each : near) {
      second = std::min(second, std::max(lowest, each.score));
      lowest = std::min(lowest, each.score);
    }
    const double limit = (job_.margins ? second : lowest) + error;
    TwoLowest found;
    if (!job_.margins && !(second <= limit)) {
      const auto best =
          std::min_element(near.begin(), near.end(),
                           [](const Scored& a, const Scored& b) { return a.score < b.score; });
      found.id = best->id;
    } else {
      for (const Scored& each : near) {
        if (each.score <= limit) measure(token, each.id, scratch, found);
      }
    }
    write(token, found);
  }

  void measure(int64_t token, int64_t v, double* scratch, TwoLowest& found) const {
    const float* x = job_.x + token * job_.x_stride;
    const float* e = job_.e + v * job_.e_stride;
    found.consider(v, squared_distance(x, e, job_.d, width_, scratch));
  }

  void write(int64_t token, const TwoLowest& found) const {
    job_.ids[token] = std::max(found.id, int64_t{0});
    if (!job_.margins) return;
    job_.margins[token] = found.id < 0 ? 0.0f : static_cast<float>(found.second - found.lowest);
  }

  const NearestToken& job_;
  Search& search_;
  const int64_t stride_;
  const int64_t width_;    // d rounded up to a power of two
  const Buffer smallest_;  // [panels][stride]
};

// The tokens that a coarse search left open, in fp32.
void search_again(const NearestToken& job, const std::vector<int64_t>& tokens) {
  const auto n = static_cast<int64_t>(tokens.size());
  std::vector<float> x(n * job.d);
  std::vector<int64_t> ids(n);
  std::vector<float> margins(n);
  for (int64_t i = 0; i < n; ++i) {
    std::copy_n(job.x + tokens[i] * job.x_stride, job.d, x.data() + i * job.d);
  }
  NearestToken part = job;
  part.x = x.data();
  part.n = n;
  part.x_stride = job.d;
  part.ids = ids.data();
  part.margins = job.margins ? margins.data() : nullptr;
  part.packed = nullptr;
  const auto search = make_float_search(part, choose_kernel(""));
  Chunk(part, *search).run();
  for (int64_t i = 0; i < n; ++i) {
    job.ids[tokens[i]] = ids[i];
    if (job.margins) job.margins[tokens[i]] = margins[i];
  }
}

void check_packed(const NearestToken& job, const std::string& path) {
  const auto& header = *static_cast<const PackedHeader*>(job.packed);
  const int32_t layout = on_bytes(path) ? kBytesLayout : choose_kernel(path).lanes;
  if (header.v != job.v || header.d != job.d || header.layout != layout) {
    throw std::invalid_argument(
        "nearest_token: packed was made of another table or for another path");
  }
}

}  // namespace

std::vector<std::string> supported_paths() {
  std::vector<std::string> names;
#if defined(__x86_64__)
  if (bytes_supported()) names.emplace_back(kBytesName);
#endif
  for (const TileKernel* kernel : supported_kernels()) names.emplace_back(kernel->name);
  return names;
}

int64_t packed_bytes(int64_t v, int64_t d, const std::string& path) {
#if defined(__x86_64__)
  if (on_bytes(path)) return bytes_packed_bytes(v, d);
#endif
  choose_kernel(path);
  return float_packed_bytes(v, d);
}

void pack_vocabulary(const NearestToken& job, const std::string& path, void* packed) {
#if defined(__x86_64__)
  if (on_bytes(path)) return pack_bytes(job, packed);
#endif
  pack_floats(job, choose_kernel(path), packed);
}

void nearest_token(const NearestToken& job, const std::string& path) {
  if (on_bytes(path) && job.packed == nullptr) {
    throw std::invalid_argument("nearest_token: the path '" + path + "' needs a packed table");
  }
  if (job.packed != nullptr) check_packed(job, path);
  for (int64_t first = 0; first < job.n; first += kChunk) {
    NearestToken part = job;
    part.x += first * job.x_stride;
    part.ids += first;
    if (part.margins != nullptr) part.margins += first;
    part.n = std::min(kChunk, job.n - first);
    const auto search = make_search(part, path);
    const std::vector<int64_t> left = Chunk(part, *search).run();
    if (!left.empty()) search_again(part, left);
  }
}

}  // namespace dlmone::cpu
