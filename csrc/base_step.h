// d_t = z - sqrt(1 - alphas_cumprod_t) b        states[step] <- d_t
// z <- c1 z + c2 b~ + sigma xi_b                states[step + 1] <- z
//
// A step of the base phase (vfengine/sampling/two_phase.py): the rules of remove_base.h and of
// decomposed_step.h on a clip of one frame, lam = 1. It counts its step itself.
#pragma once
#include "common/clock.h"
#include "common/noise.h"
#include "decomposed_step.h"
#include "remove_base.h"

namespace vf {

// z, b, mixed: [batch, pixels]; mixed is b~, null where it is b. states: [num_steps + 1, batch,
// pixels]. noise_levels: [num_steps], coeffs: [num_steps, 3]. draw: xi_b comes from `seed`.
#define VF_BASE_STEP_FIELDS(FIELD, OPTIONAL) \
  FIELD(float*, z)                           \
  FIELD(const float*, b)                     \
  OPTIONAL(const float*, mixed)              \
  FIELD(float*, states)                      \
  FIELD(const float*, noise_levels)          \
  FIELD(const float*, coeffs)                \
  FIELD(int64_t, batch)                      \
  FIELD(int64_t, pixels)                     \
  OPTIONAL(bool, draw)                       \
  OPTIONAL(PhiloxKey, seed)                  \
  OPTIONAL(uint32_t, sample_offset)          \
  FIELD(Clock, clock)
VF_ARGS(BaseStepArgs, VF_BASE_STEP_FIELDS);

}  // namespace vf
