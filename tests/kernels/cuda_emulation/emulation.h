// Enough of CUDA to run a kernel's source on a CPU, one block after the other: what a kernel
// reaches through csrc/cuda/warp.cuh and the intrinsics it uses, with every thread of a block a
// fiber.
//
// Instructions that a warp executes together (mma, ldmatrix, shuffles) wait for all 32 lanes. Their
// layouts are written down from NVIDIA's PTX ISA, section "Instruction Set": "Matrix Fragments for
// mma.m16n8k16 with floating point type", "Warp-level matrix load instruction: ldmatrix", "Data
// Movement and Conversion Instructions: cp.async" and "cp.async.wait_group", and from the CUDA C++
// Programming Guide, "Warp Shuffle Functions".
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#define DLMONE_CUDA_EMULATION
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Dim3 {
  unsigned x = 1;
};
extern Dim3 threadIdx, blockIdx, blockDim, gridDim;

struct float2 {
  float x, y;
};

using std::max;
using std::min;

namespace emulation {

// How a run may differ from the simplest one; no correct kernel notices.
struct Mode {
  bool copies_at_once;    // cp.async is done when issued, not when it is waited for
  bool threads_reversed;  // the last thread of a block runs first
};

// Runs `body` for every thread of every block. Throws std::runtime_error on a deadlock.
void launch(int blocks, int threads, int shared_bytes, const Mode& mode, void (*body)(void*),
            void* argument);

// One fiber switches to the next until all of the block (or of its warp) have come here.
void block_barrier();

// What the lanes of a warp hand to an instruction that they execute together. The last lane to
// come runs `execute` on the warp's 32 operands; then all go on.
void together(void* operands, void (*execute)(void* const* lanes));

unsigned char* shared();
void start_copy(unsigned char* to, const void* from, int bytes, bool valid);
void close_copies();
void wait_for_copies(int pending);

inline float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float sign = bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) {
    return mantissa ? std::numeric_limits<float>::quiet_NaN()
                    : sign * std::numeric_limits<float>::infinity();
  }
  return exponent ? sign * std::ldexp(float(1024 + mantissa), exponent - 25)
                  : sign * std::ldexp(float(mantissa), -24);
}

inline float bfloat16_to_float(uint16_t bits) {
  const uint32_t word = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

struct Shuffle {
  uint64_t value;
  int source;
  uint64_t result;
};

inline void shuffle(void* const* lanes) {
  for (int lane = 0; lane < 32; ++lane) {
    auto* mine = static_cast<Shuffle*>(lanes[lane]);
    mine->result = static_cast<Shuffle*>(lanes[mine->source])->value;
  }
}

template <class T>
T shuffled(T value, int source) {
  Shuffle operands{0, source, 0};
  std::memcpy(&operands.value, &value, sizeof value);
  together(&operands, &shuffle);
  std::memcpy(&value, &operands.result, sizeof value);
  return value;
}

struct LoadMatrices {
  uint32_t row;
  uint32_t* out;
};

// Matrix i has its row r at the address that lane 8 i + r holds; lane l gets elements 2 (l % 4) and
// the next of row l / 4 of each matrix.
inline void load_matrices(void* const* lanes) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const auto* owner = static_cast<LoadMatrices*>(lanes[8 * matrix + lane / 4]);
      const unsigned char* row = shared() + owner->row;
      std::memcpy(static_cast<LoadMatrices*>(lanes[lane])->out + matrix, row + 4 * (lane % 4), 4);
    }
  }
}

struct MultiplyAdd {
  const uint32_t* a;
  uint32_t b[2];
  float c[4];
  float d[4];
};

inline uint16_t element(const uint32_t* registers, int i) {
  return uint16_t(registers[i / 2] >> (16 * (i % 2)));
}

// a_i of A [16, 16]: row = group, or group + 8 for i = 2, 3, 6, 7; column = 2 * thread + i % 2, and
// 8 more from i = 4 on. b_i of B [16, 8]: row = 2 * thread + i % 2, and 8 more from i = 2 on;
// column = group. c_i and d_i of C, D [16, 8]: row = group, or group + 8 from i = 2 on; column = 2
// * thread + i % 2. group is the lane / 4, thread the lane % 4. Rounding is unspecified: here
// towards zero.
template <float (*kToFloat)(uint16_t)>
void multiply_add(void* const* lanes) {
  double a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* mine = static_cast<MultiplyAdd*>(lanes[lane]);
    const int group = lane / 4, thread = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = i % 4 < 2 ? group : group + 8;
      a[row][2 * thread + i % 2 + (i < 4 ? 0 : 8)] = kToFloat(element(mine->a, i));
    }
    for (int i = 0; i < 4; ++i) {
      b[2 * thread + i % 2 + (i < 2 ? 0 : 8)][group] = kToFloat(element(mine->b, i));
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto* mine = static_cast<MultiplyAdd*>(lanes[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i < 2 ? 0 : 8), column = 2 * (lane % 4) + i % 2;
      double sum = mine->c[i];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      float rounded = float(sum);
      if (std::abs(double(rounded)) > std::abs(sum)) rounded = std::nextafter(rounded, 0.0f);
      mine->d[i] = rounded;
    }
  }
}

template <float (*kToFloat)(uint16_t)>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  const float (&c)[4]) {
  MultiplyAdd operands{a, {b0, b1}, {c[0], c[1], c[2], c[3]}, {}};
  together(&operands, &multiply_add<kToFloat>);
  std::copy_n(operands.d, 4, d);
}

}  // namespace emulation

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __half2float(__half value) { return emulation::half_to_float(value.bits); }
inline float __bfloat162float(__nv_bfloat16 value) {
  return emulation::bfloat16_to_float(value.bits);
}
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __double2float_ru(double value) {
  const float rounded = float(value);
  return rounded < value ? std::nextafter(rounded, std::numeric_limits<float>::infinity())
                         : rounded;
}
inline int atomicAdd(int* to, int value) {
  const int before = *to;
  *to += value;
  return before;
}
inline void __syncthreads() { emulation::block_barrier(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int other) {
  return emulation::shuffled(value, int(threadIdx.x % 32) ^ other);
}
template <class T>
T __shfl_sync(unsigned, T value, int source) {
  return emulation::shuffled(value, source);
}

namespace dlmone::cuda {

using SharedAddress = uint32_t;

inline unsigned char* block_memory() { return emulation::shared(); }

inline SharedAddress shared_address(const void* pointer) {
  return SharedAddress(static_cast<const unsigned char*>(pointer) - emulation::shared());
}

inline void copy_async_16(SharedAddress to, const void* from, bool valid) {
  emulation::start_copy(emulation::shared() + to, from, 16, valid);
}

inline void copy_async_4(SharedAddress to, const void* from) {
  emulation::start_copy(emulation::shared() + to, from, 4, true);
}

inline void commit_copies() { emulation::close_copies(); }

template <int kPending>
void wait_copies() {
  emulation::wait_for_copies(kPending);
}

inline void load_matrices(uint32_t (&out)[4], SharedAddress row) {
  emulation::LoadMatrices operands{row, out};
  emulation::together(&operands, &emulation::load_matrices);
}

inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                         const float (&c)[4], __half) {
  emulation::multiply_add<emulation::half_to_float>(d, a, b0, b1, c);
}

inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                         const float (&c)[4], __nv_bfloat16) {
  emulation::multiply_add<emulation::bfloat16_to_float>(d, a, b0, b1, c);
}

}  // namespace dlmone::cuda
