// Nearest-token rounding on tensor cores (mma.sync, sm_80 and later) in four launches; nothing of
// size tokens x vocabulary exists, and the host waits for nothing.
//
// 1. search: scores |E_v|^2 / 2 - <x, E_v> of 16-bit copies, fp32 sums. A thread keeps per token
//    the lowest minimum of a group of eight vocabulary rows, that group, and the lowest minimum of
//    all other groups; each split of the vocabulary writes one such triple per token.
// 2. decide: a score is off by at most B, so the answer's is within 2 B of the lowest. Where only
//    one group reaches that limit, its eight rows are measured in fp64. Other tokens, and all where
//    margins are wanted (the limit then starts from the second-lowest), go on a list.
// 3. collect: the search again for listed tokens only, with the limit known: every row within it is
//    listed, up to 14 a token. Both kernels find the length of the list on the device.
// 4. measure: fp64 distances of the listed rows; of the whole table where they are too many, or
//    where no finite limit exists.
//
// The lists fill in any order, and no result depends on it: distances are compared by (distance,
// id), and every distance is summed in the order of reference.squared_distances.
//
// What bounds the search, for d = 128: a block of 8 warps holds 256 tokens in registers (64 of them
// per thread) and streams tiles of 64 rows (16 KiB) through three buffers: 4.2 MFLOP for 16 KiB
// from L2, 256 FLOP per byte. A warp reads a tile from shared memory once for its 32 tokens: one
// ldmatrix.x4 (512 bytes, four cycles of shared memory) feeds four mma.m16n8k16. Starting the sums
// at the half norms and negating x once, in registers, leave no arithmetic per score but the
// minimum; with the bookkeeping once in eight scores that is about 1.5 to 2 operations per score.
// 128 registers a thread let two blocks share a multiprocessor: one computes while the other waits.
#include <stdexcept>
#include <string>

#include "nearest_token.h"
#include "warp.cuh"
// The kernels use what warp.cuh declares.
#include "nearest_token_launch.cuh"

namespace dlmone::cuda {
namespace {

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string("nearest_token: ") + what + ": " + cudaGetErrorName(status) +
                           " (" + cudaGetErrorString(status) + ")");
}

}  // namespace

int64_t nearest_token_workspace(int64_t n, int64_t v, int64_t d, int multiprocessors) {
  return lay_out(make_plan(n, v, d, multiprocessors), n).bytes;
}

void nearest_token(const NearestToken& job) {
  const auto stream = static_cast<cudaStream_t>(job.stream);
  run_nearest_token(
      job, [stream](auto* kernel, int blocks, int threads, int shared, const auto& argument) {
        if (shared > 0) {
          check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
                "shared memory");
        }
        kernel<<<blocks, threads, shared, stream>>>(argument);
        check(cudaGetLastError(), "launch");
      });
}

}  // namespace dlmone::cuda
