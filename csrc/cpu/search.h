// The first phase of nearest-token rounding: approximate scores of every pair, of which only the
// lowest of each panel of the vocabulary is kept, with a bound on their error.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "nearest_token.h"
#include "tiles.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace dlmone::cpu {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

inline double norm(const float* x, int64_t d) {
  double sum = 0.0;
  for (int64_t k = 0; k < d; ++k) sum += static_cast<double>(x[k]) * x[k];
  return std::sqrt(sum);
}

// What rounding adds to half a distance in fp64: where a token is so much larger than the rows that
// fp64 finds them equally far, the lowest id wins, and no score may say otherwise.
inline double fp64_rounding(double x_norm, double largest_half_norm) {
  return std::ldexp(x_norm * x_norm + 2.0 * largest_half_norm, -48);
}

struct Scored {
  int64_t id;
  float score;
};

// Records of 8-bit integers; those of fp32 are told apart by the lanes of their kernel.
constexpr int32_t kBytesLayout = 0;

// First cache line of a packed vocabulary; a record for every panel follows.
struct alignas(kPackedAlignment) PackedHeader {
  // What was packed, and how: a reader of anything else would leave the records.
  int64_t v;
  int64_t d;
  int32_t layout;
  float largest_half_norm;
  // For integers alone: largest norms of a row as stored and of what storing it lost, and whether
  // every row could be stored.
  float largest_norm;
  float largest_loss;
  int32_t fits;
};

class Search {
 public:
  Search(const NearestToken& job, int tokens)
      : job_(job),
        panels_(ceil_div(job.v, kPanelRows)),
        tiles_(ceil_div(job.n, tokens)),
        stride_(tiles_ * tokens),
        tokens_(tokens) {}
  virtual ~Search() = default;

  int64_t panels() const { return panels_; }
  // Tokens rounded up to whole tiles: the row length of what `run` writes.
  int64_t stride() const { return stride_; }

  // smallest[panel * stride() + token] = the lowest score of the panel; NaN scores are ignored.
  void run(float* smallest) {
    prepare_tokens();
    // A vocabulary with fewer panels than threads is shared out by groups of tiles as well.
    const int64_t groups = std::min(tiles_, ceil_div(job_.threads, panels_));
    const int64_t tiles_per_group = ceil_div(tiles_, groups);
#pragma omp parallel for schedule(dynamic, 4) num_threads(job_.threads)
    for (int64_t item = 0; item < panels_ * groups; ++item) {
      const int64_t panel = item / groups;
      const int64_t first = item % groups * tiles_per_group;
      const int64_t last = std::min(tiles_, first + tiles_per_group);
      search_panel(panel, first, last, smallest + panel * stride_);
    }
    finish();
  }

  // Bound on |score - exact score| of a token; infinite where its scores say nothing.
  virtual double error(int64_t token) const = 0;
  // Appends the panel's ids whose score is at most `limit`, in rising order.
  virtual void collect(int64_t token, int64_t panel, double limit,
                       std::vector<Scored>& near) const = 0;
  // Whether an exacter search exists for tokens that this one leaves unclear.
  virtual bool coarse() const = 0;

 protected:
  const float* x_row(int64_t i) const { return job_.x + i * job_.x_stride; }
  const float* e_row(int64_t v) const { return job_.e + v * job_.e_stride; }

  virtual void prepare_tokens() = 0;
  virtual void search_panel(int64_t panel, int64_t first_tile, int64_t last_tile,
                            float* smallest) = 0;

  // After the last panel, for what the error bound needs of all of them.
  virtual void finish() {}

  const NearestToken job_;
  const int64_t panels_;
  const int64_t tiles_;
  const int64_t stride_;
  const int tokens_;
};

std::unique_ptr<Search> make_float_search(const NearestToken& job, const TileKernel& kernel);
int64_t float_packed_bytes(int64_t v, int64_t d);
void pack_floats(const NearestToken& job, const TileKernel& kernel, void* packed);

#if defined(__x86_64__)
// 8-bit integers: a quarter of the multiply-adds, and an error that the data themselves bound.
constexpr const char* kBytesName = "avx512_vnni";
bool bytes_supported();
std::unique_ptr<Search> make_bytes_search(const NearestToken& job);
int64_t bytes_packed_bytes(int64_t v, int64_t d);
void pack_bytes(const NearestToken& job, void* packed);
#endif

}  // namespace dlmone::cpu
