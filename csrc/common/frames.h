// What the per-frame ops have in common: one pass over the clip, all frames sharing an image.
//
//     out_i = w.x x_i + w.base g + w.base_noise b + w.residual r_i + w.noise xi_i
//
// x, r: [B, N, P], P = C*H*W; g, b: [B, P], shared by the N frames; xi_i: each frame's own noise.
// A rule (residual_step.h, decomposed_step.h, remove_base.h) says what the weights w are, from one
// row of coeffs and from lam_i, and which of the terms there are. Sums run in fp32, from left to
// right, without contraction to FMA, and are rounded once to the clip's dtype.
#pragma once
#include <cmath>
#include <cstdint>

#include "common/args.h"
#include "common/dtype.h"
#include "common/host_device.h"
#include "common/noise.h"

namespace vf {

// x, r, r_uncond: [batch, frames, pixels], g: [batch, pixels], lam: [frames], coeffs: [num_steps,
// Rule::kColumns], step: [1], its row of coeffs. r is null for a rule without residual; with
// r_uncond, where a rule has guidance, r is r_uncond + guidance_scale (r - r_uncond). out: x
// itself, or memory that overlaps no input. draw: b and xi_i come from these seeds, as
// decomposed_noise draws them at step *step + 1.
#define VF_FRAME_FIELDS(FIELD, OPTIONAL) \
  FIELD(const void*, x)                  \
  FIELD(const void*, g)                  \
  OPTIONAL(const void*, r)               \
  OPTIONAL(const void*, r_uncond)        \
  FIELD(const float*, lam)               \
  FIELD(const float*, coeffs)            \
  FIELD(const int32_t*, step)            \
  FIELD(void*, out)                      \
  FIELD(int64_t, batch)                  \
  FIELD(int64_t, frames)                 \
  FIELD(int64_t, pixels)                 \
  FIELD(int64_t, num_steps)              \
  OPTIONAL(float, guidance_scale)        \
  OPTIONAL(bool, draw)                   \
  OPTIONAL(PhiloxKey, base_seed)         \
  OPTIONAL(PhiloxKey, residual_seed)     \
  OPTIONAL(uint32_t, sample_offset)      \
  OPTIONAL(uint32_t, frame_offset)       \
  FIELD(DType, dtype)
VF_ARGS(FrameArgs, VF_FRAME_FIELDS);

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
