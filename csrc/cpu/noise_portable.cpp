#include "noise_tile.h"

namespace dlmone::cpu {
namespace {

bool supported() { return true; }

void words(const NoiseDraw& draw, uint32_t first, uint32_t* out) {
  generic::words(draw, first, out);
}

void normals(const NoiseDraw& draw, uint32_t first, float* out) {
  generic::normals(draw, first, out);
}

}  // namespace

const NoiseKernel kPortableNoise = {"portable", supported, words, normals};

}  // namespace dlmone::cpu
