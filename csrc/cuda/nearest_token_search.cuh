// The tensor-core kernel of nearest-token rounding; nearest_token.cu says how it is used.
#pragma once

#include "nearest_token_plan.h"

namespace dlmone::cuda {

constexpr float kInfinity = __builtin_inff();
constexpr float kLargestFloat = 3.402823466e+38f;
constexpr int kColumns = 16;  // vocabulary rows whose scores a warp holds at a time

struct Search {
  const unsigned char* x;  // rows of 16-bit elements; strides in bytes
  int64_t x_stride;
  const unsigned char* table;
  int64_t table_stride;
  const float* half_norms;
  int n;
  int v;
  int chunks;  // of 16 bytes in a row
  int tiles;
  int splits;
  // Written by the first search.
  float* lowest;
  int* group;
  float* second;
  float* largest;
  // Cleared by the first search, read and filled by the collection.
  int* unclear;
  const int* tokens;
  const float* limits;
  int* counts;
  int* candidates;
};

// The vocabulary tiles on their way through shared memory. The 16-byte chunk c of row r lies at
// place c ^ (r % 8): the eight rows of one matrix that ldmatrix reads then lie in eight different
// groups of four banks, and so do the chunks of a row that neighbouring threads write.
template <int kSteps, int kStages>
struct TileRing {
  static constexpr int kChunks = 2 * kSteps;
  static constexpr int kRowBytes = 16 * kChunks;
  static constexpr int kTileBytes = kTileRows * kRowBytes;

  const Search& job;
  unsigned char* memory;

  __device__ float* norms(int stage) const {
    return reinterpret_cast<float*>(memory + kStages * kTileBytes) + stage * kTileRows;
  }

  __device__ void load(int tile, int stage) const {
    const int first = tile * kTileRows;
    const SharedAddress to = shared_address(memory) + stage * kTileBytes;
    const int chunk = threadIdx.x % kChunks;
#pragma unroll 1
    for (int row = threadIdx.x / kChunks; row < kTileRows; row += blockDim.x / kChunks) {
      const bool valid = first + row < job.v && chunk < job.chunks;
      const int64_t offset = valid ? (first + row) * job.table_stride + 16 * chunk : 0;
      copy_async_16(to + row * kRowBytes + ((chunk ^ (row & 7)) << 4), job.table + offset, valid);
    }
    if (threadIdx.x < kTileRows) {
      const int row = first + threadIdx.x;
      float* norm = norms(stage) + threadIdx.x;
      if (row < job.v) {
        copy_async_4(shared_address(norm), job.half_norms + row);
      } else {
        *norm = kInfinity;  // a row that does not exist never wins
      }
    }
  }
};

// What a thread has seen of one token: the lowest minimum of a group of kGroupRows rows, that
// group, and the lowest minimum of any other group.
struct Seen {
  float lowest = kInfinity;
  float second = kInfinity;
  int group;

  __device__ void add(float minimum, int minimum_group) {
    second = fminf(second, fmaxf(lowest, minimum));
    group = minimum < lowest ? minimum_group : group;
    lowest = fminf(lowest, minimum);
  }

  __device__ void merge(float other_lowest, int other_group, float other_second) {
    second = fminf(fminf(second, other_second), fmaxf(lowest, other_lowest));
    group = other_lowest < lowest ? other_group : group;
    lowest = fminf(lowest, other_lowest);
  }
};

__device__ inline void list_candidate(const Search& job, int slot, int v, float score,
                                      float limit) {
  if (!(score <= limit)) return;
  const int taken = atomicAdd(job.counts + slot, 1);
  if (taken < kCandidates) job.candidates[static_cast<int64_t>(slot) * kCandidates + taken] = v;
}

// One warp's place in mma's fragments: eight quads of four lanes. A lane holds rows `quad` + 8 r of
// the warp's tokens and, of every eight vocabulary rows, the two from 2 `pair` on.
struct Lane {
  int quad = (threadIdx.x & 31) >> 2;
  int pair = threadIdx.x & 3;
  int first_token;

  __device__ int token(int r) const { return first_token + 8 * r + quad; }
};

// The whole width of 32 tokens, negated so that half norms plus products are scores.
template <class Element, int kSteps>
struct Tokens {
  uint32_t parts[2][kSteps][4];

  __device__ void load(int r, const unsigned char* row, int chunks, bool valid, int pair) {
#pragma unroll
    for (int chunk = 0; chunk < 2 * kSteps; ++chunk) {
      uint32_t two = 0;
      if (valid && chunk < chunks) {
        two = *reinterpret_cast<const uint32_t*>(row + 16 * chunk + 4 * pair) ^ 0x80008000u;
      }
      parts[r >> 1][chunk >> 1][(chunk & 1) * 2 + (r & 1)] = two;
    }
  }

  // Scores of kColumns vocabulary rows; `rows` is this lane's row for ldmatrix, whose chunk c lies
  // at c ^ swizzle, `norms` the half norms from this lane's first column on.
  __device__ void score(float (&scores)[2][2][4], SharedAddress rows, int swizzle,
                        const float* norms) const {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t e[4];
      load_matrices(e, rows + (((2 * k) ^ swizzle) << 4));
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint32_t low = e[2 * j], high = e[2 * j + 1];
        if (k == 0) {
          const float2 h = *reinterpret_cast<const float2*>(norms + 8 * j);
          const float start[4] = {h.x, h.y, h.x, h.y};
          multiply_add(scores[0][j], parts[0][k], low, high, start, Element());
          multiply_add(scores[1][j], parts[1][k], low, high, start, Element());
        } else {
          multiply_add(scores[0][j], parts[0][k], low, high, scores[0][j], Element());
          multiply_add(scores[1][j], parts[1][k], low, high, scores[1][j], Element());
        }
      }
    }
  }
};

// What becomes of the scores. The first search keeps minima: two steps of 16 columns make a group,
// which costs one and a half operations a score and keeps half a group's scores in registers.
struct KeepMinima {
  static constexpr bool kCollect = false;
  Seen seen[4];
  float half_group[4];

  __device__ void begin(const Search&, const Lane&, int r, bool, int first_column) {
    seen[r].group = first_column;
  }

  __device__ void take(const Search&, const Lane&, const float (&scores)[2][2][4], int column) {
    const bool complete = (column & kColumns) != 0;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float (&left)[4] = scores[r >> 1][0];
      const float (&right)[4] = scores[r >> 1][1];
      const int h = (r & 1) * 2;
      const float lowest = fminf(fminf(left[h], left[h + 1]), fminf(right[h], right[h + 1]));
      half_group[r] = complete ? fminf(half_group[r], lowest) : lowest;
      if (complete) seen[r].add(half_group[r], column - kColumns);
    }
  }

  __device__ void finish(const Search& job, const Lane& lane, int split) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      seen[r].group += 2 * lane.pair;
#pragma unroll
      for (int other = 1; other < 4; other <<= 1) {
        const float lowest = __shfl_xor_sync(0xffffffffu, seen[r].lowest, other);
        const int group = __shfl_xor_sync(0xffffffffu, seen[r].group, other);
        const float second = __shfl_xor_sync(0xffffffffu, seen[r].second, other);
        seen[r].merge(lowest, group, second);
      }
      if (lane.pair == 0 && lane.token(r) < job.n) {
        const int64_t place = static_cast<int64_t>(split) * job.n + lane.token(r);
        job.lowest[place] = seen[r].lowest;
        job.group[place] = seen[r].group;
        job.second[place] = seen[r].second;
      }
    }
  }
};

// The collection lists every row whose score is within the token's limit.
struct ListCandidates {
  static constexpr bool kCollect = true;
  float limit[4];

  __device__ void begin(const Search& job, const Lane& lane, int r, bool valid, int) {
    limit[r] = valid ? job.limits[lane.token(r)] : -kInfinity;
  }

  __device__ void take(const Search& job, const Lane& lane, const float (&scores)[2][2][4],
                       int column) {
    const int row = column + 2 * lane.pair;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float (&left)[4] = scores[r >> 1][0];
      const float (&right)[4] = scores[r >> 1][1];
      const int h = (r & 1) * 2;
      const float lowest = fminf(fminf(left[h], left[h + 1]), fminf(right[h], right[h + 1]));
      if (lowest <= limit[r]) {
        list_candidate(job, lane.token(r), row, left[h], limit[r]);
        list_candidate(job, lane.token(r), row + 1, left[h + 1], limit[r]);
        list_candidate(job, lane.token(r), row + 8, right[h], limit[r]);
        list_candidate(job, lane.token(r), row + 9, right[h + 1], limit[r]);
      }
    }
  }

  __device__ void finish(const Search&, const Lane&, int) {}
};

// The largest half norm of a split: whatever is not a finite number makes it infinite, because no
// bound on the scores holds for such a table. The threads of two warps look at a row of each tile
// and keep what they saw in shared memory: registers are short.
struct LargestNorm {
  float* place;

  __device__ void begin() { *place = 0.0f; }

  __device__ void add(float norm) {
    *place = norm <= kLargestFloat ? fmaxf(*place, norm) : kInfinity;
  }

  __device__ void write(const Search& job, int split) {
    float largest = *place;
    for (int other = 16; other > 0; other >>= 1) {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, other));
    }
    if ((threadIdx.x & 31) == 0) job.largest[2 * split + (threadIdx.x >> 5)] = largest;
  }
};

// One block takes 32 tokens a warp through one split of the vocabulary.
template <class Element, int kSteps, int kStages, class Sink>
__global__ void __launch_bounds__(256, kSteps == 16 ? 1 : 2) search_kernel(const Search job) {
  constexpr bool kCollect = Sink::kCollect;
  using Ring = TileRing<kSteps, kStages>;
  const int tokens = kCollect ? *job.unclear : job.n;
  const int block_tokens = static_cast<int>(blockDim.x);  // a warp has as many tokens as lanes
  const int token_tiles = (tokens + block_tokens - 1) / block_tokens;
  if (token_tiles == 0) return;
  // How many tokens are unclear is known here only, and so is how to share them out.
  const int splits =
      kCollect ? min(job.tiles, static_cast<int>(gridDim.x) / token_tiles) : job.splits;
  const int token_tile = static_cast<int>(blockIdx.x) % token_tiles;
  const int split = static_cast<int>(blockIdx.x) / token_tiles;
  if (split >= splits) return;
  if (!kCollect && blockIdx.x == 0 && threadIdx.x == 0) *job.unclear = 0;
  const int first_tile = static_cast<int>(static_cast<int64_t>(job.tiles) * split / splits);
  const int end_tile = static_cast<int>(static_cast<int64_t>(job.tiles) * (split + 1) / splits);

  Lane lane;
  lane.first_token = token_tile * block_tokens + static_cast<int>(threadIdx.x & ~31u);
  Tokens<Element, kSteps> x;
  Sink sink;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const bool valid = lane.token(r) < tokens;
    const int64_t row = !valid ? 0 : kCollect ? job.tokens[lane.token(r)] : lane.token(r);
    x.load(r, job.x + row * job.x_stride, job.chunks, valid, lane.pair);
    sink.begin(job, lane, r, valid, first_tile * kTileRows);
  }

  const Ring ring{job, block_memory()};
  // ldmatrix x4: rows 0-7 and 8-15 of 16 vocabulary rows, each with two neighbouring chunks.
  const int matrix_row = ((threadIdx.x & 16) >> 1) + (threadIdx.x & 7);
  const int swizzle = ((threadIdx.x >> 3) & 1) ^ (threadIdx.x & 7);
  const SharedAddress rows = shared_address(ring.memory) + matrix_row * Ring::kRowBytes;
  // Rows beyond the vocabulary are infinite too, and do not count.
  const bool looks_at_norms = !kCollect && token_tile == 0 && threadIdx.x < kTileRows;
  LargestNorm largest{ring.norms(kStages) + threadIdx.x};
  if (looks_at_norms) largest.begin();

  for (int t = 0; t < kStages - 1; ++t) {
    if (first_tile + t < end_tile) ring.load(first_tile + t, t);
    commit_copies();
  }
  int stage = 0;
  for (int tile = first_tile; tile < end_tile; ++tile) {
    wait_copies<kStages - 2>();
    // This tile is complete for every thread, and nobody reads the one before any more.
    __syncthreads();
    const int next = tile + kStages - 1;
    if (next < end_tile) ring.load(next, stage == 0 ? kStages - 1 : stage - 1);
    commit_copies();
    const float* norms = ring.norms(stage);
    if (lane.first_token < tokens) {
#pragma unroll 1
      for (int column = 0; column < kTileRows; column += kColumns) {
        float scores[2][2][4];
        x.score(scores, rows + stage * Ring::kTileBytes + column * Ring::kRowBytes, swizzle,
                norms + column + 2 * lane.pair);
        sink.take(job, lane, scores, tile * kTileRows + column);
      }
    }
    if (looks_at_norms && tile * kTileRows + static_cast<int>(threadIdx.x) < job.v) {
      largest.add(norms[threadIdx.x]);
    }
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  if (looks_at_norms) largest.write(job, split);
  sink.finish(job, lane, split);
}

}  // namespace dlmone::cuda
