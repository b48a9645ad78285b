// What the per-frame ops have in common: one pass over the clip, all frames sharing an image.
//
//     out_i = w.x x_i + w.base g + w.base_noise b + w.residual r_i + w.noise xi_i
//
// x, r: [B, N, P], P = C*H*W; g, b: [B, P], shared by the N frames; xi_i: each frame's own.
// A rule (residual_step.h, decomposed_step.h, remove_base.h) says what the weights w are, from one
// row of coeffs and from lam_i, and which of the terms there are. Sums run in fp32, from left to
// right, without contraction to FMA, and are rounded once to the clip's dtype.
#pragma once
#include <cmath>
#include <cstdint>

#include "common/dtype.h"
#include "common/host_device.h"
#include "common/noise.h"

namespace vf {

struct FrameArgs {
  const void* x;
  const void* r;         // null for a rule without residual
  const void* r_uncond;  // like r, or null; r is then r_uncond + guidance_scale (r - r_uncond)
  const void* xi;        // like r, or null; read only where w.noise is not 0
  const void* g;
  const float* lam;     // [N]
  const float* coeffs;  // [num_steps, Rule::kColumns]
  const int32_t* step;  // [1], row of coeffs
  void* out;            // x itself, or memory that overlaps no input
  int64_t batch, frames, pixels, num_steps;
  float guidance_scale;
  bool draw;  // draw b and xi_i with these keys, as decomposed_noise does, at step *step + 1
  PhiloxKey base_key, residual_key;
  uint32_t first_sample, first_frame;
  DType dtype;  // of x, r, r_uncond, xi, g and out
};

// The weights of one frame at one step.
struct FrameWeights {
  float x, base, base_noise, residual, noise;
};

// V: float, or a vector of floats.
template <class V>
VF_HOST_DEVICE V guided(V r, V r_uncond, float guidance_scale) {
  return r_uncond + guidance_scale * (r - r_uncond);
}

}  // namespace vf
