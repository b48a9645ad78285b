// out_i = sqrt(lam_i) b + sqrt(1 - lam_i) r_i, b and r_i of N(0, I) straight from the counter
//
// Base noise, residual noise, or the clip's noise combined of both; common/noise.h has the
// arithmetic and says where a number comes from.
#pragma once
#include "common/dtype.h"
#include "common/noise.h"

namespace vf {

struct NoiseArgs {
  void* out;         // [B, N, P]; for base noise alone N = 1
  const float* lam;  // [N] to combine both, or null for one of them
  int64_t batch, frames, pixels;
  bool base;  // without lam: base noise, else residual noise
  PhiloxKey base_key, residual_key;
  uint32_t step, first_sample, first_frame;
  DType dtype;  // of out; words: the random 32-bit words themselves (without lam)
};

void decomposed_noise_cuda(const NoiseArgs& args, int device, void* stream);

}  // namespace vf
