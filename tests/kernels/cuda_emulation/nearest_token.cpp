// csrc/cuda's nearest-token kernels on the emulation, as a function for ctypes.
#include <exception>
#include <iterator>
#include <string>
#include <type_traits>

#include "emulation.h"
// The kernels use what emulation.h declares.
#include "nearest_token_launch.cuh"

using dlmone::cuda::NearestToken;

namespace {

template <class Kernel, class Argument>
struct Call {
  Kernel kernel;
  Argument argument;

  static void run(void* call) {
    auto* self = static_cast<Call*>(call);
    self->kernel(self->argument);
  }
};

thread_local std::string failure;

}  // namespace

extern "C" int64_t workspace_bytes(int64_t n, int64_t v, int64_t d, int multiprocessors) {
  return lay_out(dlmone::cuda::make_plan(n, v, d, multiprocessors), n).bytes;
}

extern "C" void describe_plan(int64_t n, int64_t v, int64_t d, int multiprocessors, int* out) {
  const dlmone::cuda::Plan plan = dlmone::cuda::make_plan(n, v, d, multiprocessors);
  const int values[] = {plan.warps, plan.token_tiles, plan.tiles, plan.splits, plan.resident};
  std::copy(std::begin(values), std::end(values), out);
}

// An empty string, or what went wrong. `unclear` gets how many tokens needed the collection, how
// many of them were measured against the whole table.
extern "C" const char* nearest_token(const NearestToken* job, int copies_at_once,
                                     int threads_reversed, int* unclear) {
  failure.clear();
  try {
    const emulation::Mode mode{copies_at_once != 0, threads_reversed != 0};
    run_nearest_token(
        *job, [&mode](auto kernel, int blocks, int threads, int shared, const auto& argument) {
          Call<decltype(kernel), std::decay_t<decltype(argument)>> call{kernel, argument};
          emulation::launch(blocks, threads, shared, mode, &decltype(call)::run, &call);
        });
    const auto w =
        lay_out(dlmone::cuda::make_plan(job->n, job->v, job->d, job->multiprocessors), job->n);
    unclear[0] = job->n ? *dlmone::cuda::at<int>(*job, w.unclear) : 0;
    unclear[1] = 0;
    for (int i = 0; i < unclear[0]; ++i) {
      unclear[1] += dlmone::cuda::at<int>(*job, w.counts)[i] > dlmone::cuda::kCandidates;
    }
  } catch (const std::exception& error) {
    failure = error.what();
  }
  return failure.c_str();
}
