#include "noise_tile.h"

namespace dlmone::cpu {
namespace {

bool supported() { return true; }

void words(const NoiseDraw& draw, uint32_t first, uint32_t* out) {
  uint32_t found[4][kNoiseTile];
  generic::philox(draw, first, found);
  generic::interleave4(found, out);
}

void normals(const NoiseDraw& draw, uint32_t first, float* out) {
  uint32_t found[4][kNoiseTile];
  generic::philox(draw, first, found);
  generic::normals(found, out);
}

}  // namespace

const NoiseKernel kPortableNoise = {"portable", supported, words, normals};

}  // namespace dlmone::cpu
