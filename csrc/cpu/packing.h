// Aligned memory and the transposed layouts that the tile kernels read.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace dlmone::cpu {

// Cache-line aligned floats that start uninitialised: every element is written before it is read.
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<float*>(::operator new(sizeof(float) * size, kAlignment))) {}
  float* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(float* p) const { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<float, Free> data_;
};

// [rows, d] -> [d][lanes], zeros in the lanes beyond `rows`.
inline void interleave(const float* from, int64_t stride, int64_t rows, int64_t d, int64_t lanes,
                       float* to) {
  for (int64_t j = 0; j < lanes; ++j) {
    const float* row = from + j * stride;
    for (int64_t k = 0; k < d; ++k) to[k * lanes + j] = j < rows ? row[k] : 0.0f;
  }
}

using Vector = float __attribute__((vector_size(16)));

// The same for whole groups of four rows and channels: registers transpose 4 x 4 elements.
inline void interleave_fast(const float* from, int64_t stride, int64_t d, int64_t lanes,
                            float* to) {
  const int64_t whole = d / 4 * 4;
  for (int64_t j = 0; j < lanes; j += 4) {
    const float* rows = from + j * stride;
    for (int64_t k = 0; k < whole; k += 4) {
      Vector a, b, c, e;
      __builtin_memcpy(&a, rows + k, sizeof a);
      __builtin_memcpy(&b, rows + stride + k, sizeof b);
      __builtin_memcpy(&c, rows + 2 * stride + k, sizeof c);
      __builtin_memcpy(&e, rows + 3 * stride + k, sizeof e);
      const Vector ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
      const Vector ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
      const Vector ce_low = __builtin_shufflevector(c, e, 0, 4, 1, 5);
      const Vector ce_high = __builtin_shufflevector(c, e, 2, 6, 3, 7);
      const Vector columns[4] = {__builtin_shufflevector(ab_low, ce_low, 0, 1, 4, 5),
                                 __builtin_shufflevector(ab_low, ce_low, 2, 3, 6, 7),
                                 __builtin_shufflevector(ab_high, ce_high, 0, 1, 4, 5),
                                 __builtin_shufflevector(ab_high, ce_high, 2, 3, 6, 7)};
      for (int i = 0; i < 4; ++i) __builtin_memcpy(to + (k + i) * lanes + j, &columns[i], 16);
    }
    for (int64_t k = whole; k < d; ++k) {
      for (int i = 0; i < 4; ++i) to[k * lanes + j + i] = rows[i * stride + k];
    }
  }
}

}  // namespace dlmone::cpu
