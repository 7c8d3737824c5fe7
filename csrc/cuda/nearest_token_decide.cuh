// The exact part of nearest-token rounding: which rows can be the answer, and their fp64 distances.
// One warp works on one token.
#pragma once

#include "nearest_token_plan.h"
#include "nearest_token_search.cuh"

namespace dlmone::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr double kInfinity64 = __builtin_inf();

struct Decide {
  const void* x;
  Type x_type;
  int64_t x_stride;
  const void* embedding;
  int64_t embedding_stride;
  int n;
  int v;
  int d;
  int splits;
  double operand_roundoff;
  const float* lowest;
  const int* group;
  const float* second;
  const float* largest;
  int* unclear;
  int* tokens;
  float* limits;
  int* counts;
  const int* candidates;
  int64_t* ids;
  float* margins;
};

__device__ inline double to_double(float value) { return value; }
__device__ inline double to_double(__half value) { return __half2float(value); }
__device__ inline double to_double(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ inline double load_double(const void* row, Type type, int64_t i) {
  if (type == Type::kFloat32) return to_double(static_cast<const float*>(row)[i]);
  if (type == Type::kFloat16) return to_double(static_cast<const __half*>(row)[i]);
  return to_double(static_cast<const __nv_bfloat16*>(row)[i]);
}

// One token in fp64, spread over the warp: lane i holds elements i, i + 32, ..., zeros beyond d.
template <class Element, int kPerLane>
struct Token {
  double x[kPerLane];
  const Decide& job;
  int lane;

  __device__ Token(const Decide& job, int64_t token, int lane) : job(job), lane(lane) {
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const int k = lane + 32 * j;
      x[j] = k < job.d ? load_double(job.x, job.x_type, token * job.x_stride + k) : 0.0;
    }
  }

  // Sums by folding halves onto each other, the order of reference.squared_distances. Zeros
  // beyond d change nothing, and no multiplication may merge with an addition.
  __device__ static double fold(double (&terms)[kPerLane]) {
#pragma unroll
    for (int half = kPerLane / 2; half > 0; half /= 2) {
#pragma unroll
      for (int j = 0; j < half; ++j) terms[j] = __dadd_rn(terms[j], terms[j + half]);
    }
    double sum = terms[0];
#pragma unroll
    for (int other = 16; other > 0; other >>= 1) {
      sum = __dadd_rn(sum, __shfl_xor_sync(kAllLanes, sum, other));
    }
    return sum;
  }

  __device__ double squared_norm() const {
    double terms[kPerLane];
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) terms[j] = __dmul_rn(x[j], x[j]);
    return fold(terms);
  }

  __device__ double squared_distance(int v) const {
    const Element* row = static_cast<const Element*>(job.embedding) + v * job.embedding_stride;
    double terms[kPerLane];
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const int k = lane + 32 * j;
      const double e = k < job.d ? to_double(row[k]) : 0.0;
      const double difference = __dadd_rn(x[j], -e);
      terms[j] = __dmul_rn(difference, difference);
    }
    return fold(terms);
  }
};

// The two lowest distances in whatever order the rows come; the lower id among equals.
struct TwoLowest {
  double lowest = kInfinity64;
  double second = kInfinity64;
  int id = 0;

  __device__ void add(int v, double distance) {
    // Infinite or not a number: never wins, and leaves id 0 where nothing else is there.
    if (!(distance < kInfinity64)) return;
    if (distance < lowest || (distance == lowest && v < id)) {
      second = lowest;
      lowest = distance;
      id = v;
    } else {
      second = fmin(second, distance);
    }
  }

  __device__ void write(const Decide& job, int64_t token) const {
    job.ids[token] = id;
    if (job.margins == nullptr) return;
    const bool none = lowest == kInfinity64;
    job.margins[token] = none ? 0.0f : static_cast<float>(second - lowest);
  }
};

// Bound on |score - exact score| for every row of the table; infinite beyond fp32's range.
//
// Tensor cores accumulate with "at least single precision", order and rounding unspecified (PTX
// ISA, mma): 2^-22 per addition instead of fp32's 2^-24 leaves room for truncated sums. Products
// below the normal numbers may count as zero, and half norms may have lost as much: `lost`. The
// answer is that of fp64 distances, so where their own rounding makes ties, all of them count: the
// last term. With `lost` it also covers an operand below the normal numbers that counts as zero:
// 2^-49 x^2 + lost >= 2^-86 sqrt(d) x, far above the 2^-126 sqrt(d) x that this can change.
__device__ inline double score_error(double x_norm, double largest_half_norm, int d,
                                     double operand_roundoff) {
  const double half = 1.01 * largest_half_norm;
  const double lost = (d + 20) * 0x1p-125;
  const double e_norm = sqrt(2.0 * half + lost);
  const double size = x_norm * e_norm + half;
  const double relative = 1.01 * (d + 20) * 0x1p-22 + 2.1 * operand_roundoff;
  if (!(size < 1e37)) return kInfinity64;
  const double distance = (x_norm + e_norm) * (x_norm + e_norm);
  return relative * size + lost + 0x1p-49 * distance;
}

__device__ inline Seen merge_splits(const Decide& job, int64_t token, int lane, float& largest) {
  Seen seen;
  seen.group = 0;
  largest = 0.0f;
  for (int split = lane; split < job.splits; split += 32) {
    const int64_t place = static_cast<int64_t>(split) * job.n + token;
    seen.merge(job.lowest[place], job.group[place], job.second[place]);
    largest = fmaxf(largest, fmaxf(job.largest[2 * split], job.largest[2 * split + 1]));
  }
#pragma unroll
  for (int other = 16; other > 0; other >>= 1) {
    const float lowest = __shfl_xor_sync(kAllLanes, seen.lowest, other);
    const int group = __shfl_xor_sync(kAllLanes, seen.group, other);
    const float second = __shfl_xor_sync(kAllLanes, seen.second, other);
    seen.merge(lowest, group, second);
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, other));
  }
  // Lanes may disagree on the group of equal minima; such a token is unclear anyway.
  seen.group = __shfl_sync(kAllLanes, seen.group, 0);
  return seen;
}

template <class Element, int kPerLane>
__global__ void __launch_bounds__(kDecideThreads, 8) decide_kernel(const Decide job) {
  const int lane = threadIdx.x & 31;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kDecideThreads + threadIdx.x;
  const int64_t i = index >> 5;
  if (i >= job.n) return;
  const Token<Element, kPerLane> token(job, i, lane);
  const double norm = sqrt(token.squared_norm());
  TwoLowest best;
  if (!(norm < kInfinity64)) {  // no distance is finite
    if (lane == 0) best.write(job, i);
    return;
  }
  float largest;
  const Seen seen = merge_splits(job, i, lane, largest);
  const double error = score_error(norm, largest, job.d, job.operand_roundoff);
  const bool with_margin = job.margins != nullptr;
  const double from = with_margin ? seen.second : seen.lowest;
  // Rounded up; infinite or not a number where the search proved nothing.
  const float limit = __double2float_ru(from + 2.0 * error);
  if (!with_margin && limit <= kLargestFloat && seen.second > limit) {
#pragma unroll
    for (int r = 0; r < kGroupRows; ++r) {
      const int v = seen.group + 8 * (r >> 1) + (r & 1);
      if (v < job.v) best.add(v, token.squared_distance(v));
    }
    if (lane == 0) best.write(job, i);
  } else if (lane == 0) {
    const int slot = atomicAdd(job.unclear, 1);
    const bool bounded = limit <= kLargestFloat;
    job.tokens[slot] = static_cast<int>(i);
    job.limits[slot] = bounded ? limit : -kInfinity;
    job.counts[slot] = bounded ? 0 : kCandidates + 1;
  }
}

template <class Element, int kPerLane>
__global__ void __launch_bounds__(kDecideThreads, 8) measure_kernel(const Decide job) {
  const int lane = threadIdx.x & 31;
  const int warps = static_cast<int>(gridDim.x) * (kDecideThreads / 32);
  const int unclear = *job.unclear;
  for (int slot = (blockIdx.x * kDecideThreads + threadIdx.x) >> 5; slot < unclear; slot += warps) {
    const int64_t i = job.tokens[slot];
    const Token<Element, kPerLane> token(job, i, lane);
    const int count = job.counts[slot];
    TwoLowest best;
    if (count <= kCandidates) {
      const int* candidates = job.candidates + static_cast<int64_t>(slot) * kCandidates;
      for (int c = 0; c < count; ++c) {
        const int v = candidates[c];
        best.add(v, token.squared_distance(v));
      }
    } else {
#pragma unroll 4
      for (int v = 0; v < job.v; ++v) best.add(v, token.squared_distance(v));
    }
    if (lane == 0) best.write(job, i);
  }
}

}  // namespace dlmone::cuda
