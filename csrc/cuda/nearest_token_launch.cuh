// The sequence of kernels of one call. `launch(kernel, blocks, threads, shared bytes, argument)`
// is the caller's: a CUDA launch, or a test's emulation of one.
#pragma once

#include "nearest_token_decide.cuh"
#include "nearest_token_plan.h"
#include "nearest_token_search.cuh"

namespace dlmone::cuda {

template <class T>
T* at(const NearestToken& job, int64_t offset) {
  return reinterpret_cast<T*>(static_cast<unsigned char*>(job.workspace) + offset);
}

inline Search search_arguments(const NearestToken& job, const Plan& plan, const Workspace& w) {
  Search search{};
  search.x = static_cast<const unsigned char*>(job.search_x);
  search.x_stride = 2 * job.search_x_stride;
  search.table = static_cast<const unsigned char*>(job.search_table);
  search.table_stride = 2 * job.search_table_stride;
  search.half_norms = job.half_norms;
  search.n = static_cast<int>(job.n);
  search.v = static_cast<int>(job.v);
  search.chunks = static_cast<int>(2 * ceil_div(job.d, 16));
  search.tiles = plan.tiles;
  search.splits = plan.splits;
  search.lowest = at<float>(job, w.lowest);
  search.group = at<int>(job, w.group);
  search.second = at<float>(job, w.second);
  search.largest = at<float>(job, w.largest);
  search.unclear = at<int>(job, w.unclear);
  search.tokens = at<int>(job, w.tokens);
  search.limits = at<float>(job, w.limits);
  search.counts = at<int>(job, w.counts);
  search.candidates = at<int>(job, w.candidates);
  return search;
}

inline Decide decide_arguments(const NearestToken& job, const Plan& plan, const Workspace& w) {
  Decide decide{};
  decide.x = job.x;
  decide.x_type = job.x_type;
  decide.x_stride = job.x_stride;
  decide.embedding = job.embedding;
  decide.embedding_stride = job.embedding_stride;
  decide.n = static_cast<int>(job.n);
  decide.v = static_cast<int>(job.v);
  decide.d = static_cast<int>(job.d);
  decide.splits = plan.splits;
  decide.operand_roundoff = job.operand_roundoff;
  decide.lowest = at<float>(job, w.lowest);
  decide.group = at<int>(job, w.group);
  decide.second = at<float>(job, w.second);
  decide.largest = at<float>(job, w.largest);
  decide.unclear = at<int>(job, w.unclear);
  decide.tokens = at<int>(job, w.tokens);
  decide.limits = at<float>(job, w.limits);
  decide.counts = at<int>(job, w.counts);
  decide.candidates = at<int>(job, w.candidates);
  decide.ids = job.ids;
  decide.margins = job.margins;
  return decide;
}

template <class Searched, class Element, int kSteps, class Launch>
void run_kernels(const NearestToken& job, const Plan& plan, Launch&& launch) {
  constexpr int kStages = kSteps == 16 ? 2 : 3;
  const Workspace workspace = lay_out(plan, job.n);
  const Search search = search_arguments(job, plan, workspace);
  const Decide decide = decide_arguments(job, plan, workspace);
  const int threads = 32 * plan.warps;
  const int shared = shared_bytes(plan);
  const int decide_blocks = static_cast<int>(ceil_div(job.n, kDecideThreads / 32));
  launch(search_kernel<Searched, kSteps, kStages, KeepMinima>, plan.token_tiles * plan.splits,
         threads, shared, search);
  launch(decide_kernel<Element, kSteps / 2>, decide_blocks, kDecideThreads, 0, decide);
  // Both find on the device how many tokens are unclear, mostly none.
  launch(search_kernel<Searched, kSteps, kStages, ListCandidates>,
         std::max(plan.resident, plan.token_tiles), threads, shared, search);
  launch(measure_kernel<Element, kSteps / 2>, std::min(decide_blocks, 8 * job.multiprocessors),
         kDecideThreads, 0, decide);
}

template <class Searched, class Element, class Launch>
void run_width(const NearestToken& job, Launch&& launch) {
  const Plan plan = make_plan(job.n, job.v, job.d, job.multiprocessors);
  if (plan.k_steps == 4) return run_kernels<Searched, Element, 4>(job, plan, launch);
  if (plan.k_steps == 8) return run_kernels<Searched, Element, 8>(job, plan, launch);
  run_kernels<Searched, Element, 16>(job, plan, launch);
}

template <class Searched, class Launch>
void run_element(const NearestToken& job, Launch&& launch) {
  switch (job.embedding_type) {
    case Type::kFloat32:
      return run_width<Searched, float>(job, launch);
    case Type::kFloat16:
      return run_width<Searched, __half>(job, launch);
    case Type::kBFloat16:
      return run_width<Searched, __nv_bfloat16>(job, launch);
  }
}

template <class Launch>
void run_nearest_token(const NearestToken& job, Launch&& launch) {
  if (job.n == 0) return;
  if (job.search_type == Type::kFloat16) return run_element<__half>(job, launch);
  run_element<__nv_bfloat16>(job, launch);
}

}  // namespace dlmone::cuda
