#include "noise.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "noise_tile.h"

namespace dlmone::cpu {
namespace {

// Counters in one piece of work for a thread: about 20 microseconds.
constexpr int64_t kSpan = 1024;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

const NoiseKernel& choose_kernel(const std::string& path) {
#if defined(__x86_64__)
  for (const NoiseKernel* kernel : {&kAvx512Noise, &kAvx2Noise}) {
    if (kernel->supported() && (path.empty() || path == kernel->name)) return *kernel;
  }
#endif
  if (path.empty() || path == kPortableNoise.name) return kPortableNoise;
  throw std::invalid_argument("noise: this CPU has no path '" + path + "'");
}

NoiseDraw draw_of(const Noise& noise, int64_t row) {
  const int64_t* words = noise.draws + 4 * row;
  return {{static_cast<uint32_t>(words[0]), static_cast<uint32_t>(words[1])},
          noise.stream,
          static_cast<uint32_t>(words[2]),
          static_cast<uint32_t>(words[3])};
}

// body(row, first, last) over all of [0, rows) x [0, length), in pieces of at most `span`.
template <typename Body>
void for_each_span(int64_t rows, int64_t length, int64_t span, int threads, const Body& body) {
  const int64_t spans = ceil_div(length, span);
  const int64_t items = rows * spans;
  const int team = static_cast<int>(std::min<int64_t>(threads, items));
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
  for (int64_t item = 0; item < items; ++item) {
    const int64_t first = item % spans * span;
    body(item / spans, first, std::min(length, first + span));
  }
}

// sink(position, channel, normals, n) for the positions [first, last) of one row, in order.
template <typename Sink>
void for_each_piece(const NoiseKernel& kernel, const NoiseDraw& draw, int64_t first, int64_t last,
                    int64_t channels, const Sink& sink) {
  alignas(64) float normals[4 * kNoiseTile];
  const int64_t blocks = ceil_div(channels, 4);
  const int64_t end = last * blocks;
  int64_t position = first;
  int64_t block = 0;
  for (int64_t counter = first * blocks; counter < end; counter += kNoiseTile) {
    kernel.normals(draw, static_cast<uint32_t>(counter), normals);
    const int64_t count = std::min(kNoiseTile, end - counter);
    for (int64_t done = 0; done < count;) {
      const int64_t taken = std::min(count - done, blocks - block);
      sink(position, 4 * block, normals + 4 * done, std::min(4 * taken, channels - 4 * block));
      done += taken;
      block += taken;
      if (block == blocks) {
        block = 0;
        ++position;
      }
    }
  }
}

// x_t for some positions of one row.
class DiffusedRow {
 public:
  DiffusedRow(const Noise& noise, const Diffusion& diffusion, int64_t row, float* out)
      : channels_(noise.channels),
        alpha_(diffusion.alpha[row]),
        sigma_(diffusion.sigma[row]),
        mask_(diffusion.mask ? diffusion.mask + row * noise.positions : nullptr),
        ids_(diffusion.ids ? diffusion.ids + row * noise.positions : nullptr),
        x0_(ids_ ? diffusion.x0 : diffusion.x0 + row * noise.positions * noise.channels),
        out_(out + row * noise.positions * noise.channels) {}

  void run(const NoiseKernel& kernel, const NoiseDraw& draw, int64_t first, int64_t last) const {
    while (first < last) {
      int64_t end = first + 1;
      while (end < last && is_target(end) == is_target(first)) ++end;
      is_target(first) ? diffuse(kernel, draw, first, end) : copy(first, end);
      first = end;
    }
  }

 private:
  bool is_target(int64_t position) const { return !mask_ || mask_[position] != 0; }
  const float* clean(int64_t position) const {
    return x0_ + (ids_ ? ids_[position] : position) * channels_;
  }

  void copy(int64_t first, int64_t last) const {
    for (int64_t position = first; position < last; ++position) {
      std::memcpy(out_ + position * channels_, clean(position), channels_ * sizeof(float));
    }
  }

  void diffuse(const NoiseKernel& kernel, const NoiseDraw& draw, int64_t first,
               int64_t last) const {
    for_each_piece(kernel, draw, first, last, channels_,
                   [this](int64_t position, int64_t channel, const float* normals, int64_t n) {
                     const float* __restrict x0 = clean(position) + channel;
                     float* __restrict out = out_ + position * channels_ + channel;
                     const float alpha = alpha_;
                     const float sigma = sigma_;
                     for (int64_t k = 0; k < n; ++k) out[k] = alpha * x0[k] + sigma * normals[k];
                   });
  }

  const int64_t channels_;
  const float alpha_;
  const float sigma_;
  const uint8_t* const mask_;
  const int64_t* const ids_;
  const float* const x0_;
  float* const out_;
};

int64_t positions_per_span(int64_t channels) {
  return std::max<int64_t>(1, kSpan / ceil_div(channels, 4));
}

}  // namespace

void normal(const Noise& noise, float* out, const std::string& path) {
  const NoiseKernel& kernel = choose_kernel(path);
  for_each_span(noise.rows, noise.positions, positions_per_span(noise.channels), noise.threads,
                [&](int64_t row, int64_t first, int64_t last) {
                  float* const values = out + row * noise.positions * noise.channels;
                  for_each_piece(
                      kernel, draw_of(noise, row), first, last, noise.channels,
                      [&](int64_t position, int64_t channel, const float* normals, int64_t n) {
                        std::copy_n(normals, n, values + position * noise.channels + channel);
                      });
                });
}

void forward_diffusion(const Noise& noise, const Diffusion& diffusion, float* out,
                       const std::string& path) {
  const NoiseKernel& kernel = choose_kernel(path);
  for_each_span(noise.rows, noise.positions, positions_per_span(noise.channels), noise.threads,
                [&](int64_t row, int64_t first, int64_t last) {
                  const DiffusedRow diffused(noise, diffusion, row, out);
                  diffused.run(kernel, draw_of(noise, row), first, last);
                });
}

void philox_words(const Noise& noise, uint32_t first, int64_t count, int64_t* out,
                  const std::string& path) {
  const NoiseKernel& kernel = choose_kernel(path);
  for_each_span(noise.rows, count, kNoiseTile, noise.threads,
                [&](int64_t row, int64_t start, int64_t end) {
                  uint32_t words[4 * kNoiseTile];
                  kernel.words(draw_of(noise, row), first + static_cast<uint32_t>(start), words);
                  std::copy_n(words, 4 * (end - start), out + 4 * (row * count + start));
                });
}

}  // namespace dlmone::cpu
