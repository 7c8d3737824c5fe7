// How one call is cut into blocks and where its intermediate results lie: plain arithmetic on the
// shapes and the number of multiprocessors, so that the same call always runs the same way.
#pragma once

#include <algorithm>
#include <cstdint>

#include "nearest_token.h"

namespace dlmone::cuda {

constexpr int kTileRows = 64;    // vocabulary rows per step of the pipeline
constexpr int kWarpTokens = 32;  // tokens that one warp keeps in registers
constexpr int kGroupRows = 8;    // vocabulary rows behind one recorded minimum
constexpr int kCandidates = 14;  // ids kept for an unclear token; more of them: all are measured
constexpr int kDecideThreads = 128;

struct Plan {
  int k_steps;      // the width in units of 16 that the kernels are compiled for
  int stages;       // vocabulary tiles in shared memory
  int warps;        // of a search block
  int token_tiles;  // blocks along the tokens
  int tiles;        // vocabulary tiles in all
  int splits;       // blocks along the vocabulary
  int resident;     // search blocks that the device holds at a time
};

// Where each array begins, in bytes.
struct Workspace {
  int64_t lowest, group, second;   // fp32, int32, fp32 [splits, n]
  int64_t largest;                 // fp32 [splits, 2]
  int64_t unclear;                 // int32: how many tokens are in the next four
  int64_t tokens, limits, counts;  // int32, fp32, int32 [n]
  int64_t candidates;              // int32 [n, kCandidates]
  int64_t bytes;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// More splits fill the device; every block loads its tokens anew, which costs about two tiles.
inline int choose_splits(int64_t token_tiles, int64_t tiles, int64_t resident) {
  const int64_t most = std::min(tiles, std::max<int64_t>(4, resident / token_tiles));
  int64_t best = 1, best_cost = 0;
  for (int64_t splits = 1; splits <= most; ++splits) {
    const int64_t cost = ceil_div(token_tiles * splits, resident) * (ceil_div(tiles, splits) + 2);
    if (splits == 1 || cost < best_cost) {
      best = splits;
      best_cost = cost;
    }
  }
  return static_cast<int>(best);
}

inline Plan make_plan(int64_t n, int64_t v, int64_t d, int multiprocessors) {
  Plan plan{};
  plan.k_steps = d <= 64 ? 4 : d <= 128 ? 8 : 16;
  plan.stages = plan.k_steps == 16 ? 2 : 3;
  plan.warps = n <= 4 * kWarpTokens ? 4 : 8;
  plan.token_tiles = static_cast<int>(ceil_div(std::max<int64_t>(n, 1), plan.warps * kWarpTokens));
  plan.tiles = static_cast<int>(ceil_div(v, kTileRows));
  plan.resident = multiprocessors * (plan.k_steps == 16 && plan.warps == 8 ? 1 : 2);
  plan.splits = choose_splits(plan.token_tiles, plan.tiles, plan.resident);
  return plan;
}

inline Workspace lay_out(const Plan& plan, int64_t n) {
  Workspace workspace{};
  int64_t end = 0;
  const auto place = [&end](int64_t words) {
    const int64_t begin = end;
    end = ceil_div(end + 4 * words, 16) * 16;
    return begin;
  };
  workspace.lowest = place(plan.splits * n);
  workspace.group = place(plan.splits * n);
  workspace.second = place(plan.splits * n);
  workspace.largest = place(2 * plan.splits);
  workspace.unclear = place(1);
  workspace.tokens = place(n);
  workspace.limits = place(n);
  workspace.counts = place(n);
  workspace.candidates = place(kCandidates * n);
  workspace.bytes = end;
  return workspace;
}

// The tiles, their half norms, and the largest half norm that each of kTileRows threads saw.
inline int shared_bytes(const Plan& plan) {
  return plan.stages * kTileRows * (plan.k_steps * 32 + 4) + kTileRows * 4;
}

}  // namespace dlmone::cuda
